"""The tables of docs/performance.md, each from the result files that it names below itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import Any

from benchmarks.report.backend_tables import (
    backend_accuracy,
    backend_cold_start,
    backend_mixture,
    backend_patches,
    backend_requests,
)
from benchmarks.report.dicom_tables import dicom_reading, dicom_series, dicom_writing
from benchmarks.report.image_tables import image_start
from benchmarks.report.results import (
    link,
    load,
    median_and_quartiles,
    mib,
    percent,
    quartiles,
    seconds,
    shape,
    small_case,
    source,
    table,
    times,
)
from benchmarks.report.training import distill_costs, distill_dice, region_epochs, region_work

_CODECS = {"nii.gz": "nii.gz", "nrrd": "nrrd (gzip)", "mha": "mha (zlib)", "nii": "nii", "plain.mha": "mha, plain"}
_ALL_CLASSES = "117 labels"


def command() -> str:
    """A request beside the command."""
    cases = load("command")["cases"]
    rows = [
        (
            f"MR at {name}, {shape(case['image']['shape'])}",
            seconds(case["server_seconds"]["median"]),
            seconds(case["command_seconds"]["median"]),
            f"{times(case['ratio']['median'])} ({times(case['ratio']['min'])} to {times(case['ratio']['max'])})",
            case["different_voxels"],
        )
        for name, case in cases.items()
    ]
    head = ("image", "warm request", "`nnUNetv2_predict`", "times sooner: median (range)", "voxels different")
    return table(head, rows) + "\n\n" + source("command")


def whole_request() -> str:
    """A request of a network with 40 classes beside the command and the loaded predictor."""
    rows = []
    for name, case in load("whole_request")["cases"].items():
        took, ratio = case["seconds"], case["ratio_to_server"]
        row = [f"MR at {name}, {shape(case['image']['shape'])}", seconds(took["server"]["median"])]
        for side in ("predictor, loaded", "command"):
            row += [seconds(took[side]["median"]), median_and_quartiles(ratio[side])]
        rows.append((*row, sum(case["different_voxels"].values())))
    head = (
        "image", "warm request", "stock, loaded", "times sooner (quartiles)", "`nnUNetv2_predict`",
        "times sooner (quartiles)", "voxels different",
    )  # fmt: skip
    return table(head, rows) + "\n\n" + source("whole_request")


def recipes() -> str:
    """A cascade and an ensemble beside nnU-Net's commands and its loaded predictors."""
    rows = []
    for case in load("recipes")["cases"].values():
        took, ratio = case["seconds"], case["ratio_to_server"]
        row = [f"{case['title']}, {shape(case['image']['shape'])}", seconds(took["server"]["median"])]
        for side in ("predictors, loaded", "commands"):
            row += [seconds(took[side]["median"]), median_and_quartiles(ratio[side])]
        row += [mib(case["our_extra_bytes"]), mib(case["stock_extra_bytes"])]
        rows.append((*row, sum(case["different_voxels"].values())))
    head = (
        "MR at 1 mm", "warm request", "stock, loaded", "times sooner (quartiles)", "stock's commands",
        "times sooner (quartiles)", "extra MiB: here", "stock, loaded", "voxels different",
    )  # fmt: skip
    return table(head, rows) + "\n\n" + source("recipes")


def postprocess() -> str:
    """Components removed, beside nnU-Net's function."""
    rows = []
    for case in load("postprocess")["cases"].values():
        is_timed = "ratio" in case
        rows.append(
            (
                f"{case['title']}, {shape(case['shape'])}",
                seconds(case["stock_seconds"]["median"]) if is_timed else "",
                seconds(case["our_seconds"]["median"]) if is_timed else "",
                quartiles(case["ratio"]) if is_timed else "",
                mib(case["stock_extra_bytes"]) if is_timed else "",
                mib(case["our_extra_bytes"]),
                mib(case["charged_bytes"]),
                case["different_voxels"] if is_timed else "",
            )
        )
    head = (
        "label map", "stock", "here", "times sooner, quartiles", "extra MiB: stock", "here", "charged",
        "voxels different",
    )  # fmt: skip
    return table(head, rows) + "\n\n" + source("postprocess")


def overhead() -> str:
    """What serving adds to the loaded predictor."""

    def late(difference: Mapping[str, float]) -> str:
        middle, first, third = (f"{difference[key]:+.2f}".replace("-", "−") for key in ("median", "q1", "q3"))
        return f"{middle} s ({first} to {third})"

    rows = [
        (
            f"{name}, {shape(case['image']['shape'])}",
            seconds(case["server_seconds"]["median"]),
            late(case["difference_seconds"]),
            late(case["difference_without_files_seconds"]),
            case["different_voxels"],
        )
        for name, case in load("overhead")["cases"].items()
    ]
    head = (
        "image", "request", "later than stock that reads and writes files", "later than stock without files",
        "voxels different",
    )  # fmt: skip
    return table(head, rows) + "\n\n" + source("overhead")


def throughput() -> str:
    """Requests a second."""
    document = load("throughput")
    stock, _, eight, batched = document["requests_per_second"]
    different = {eight: document["different_from_stock"], batched: document["batches_of_4_different_from_stock"]}
    rows = []
    for side, rate in document["requests_per_second"].items():
        ratio = document["throughput_ratio_to_stock_of_parts"][side] if side != stock else None
        voxels = different[side]["voxels"] if side in different else ""
        rows.append((side, f"{rate:.2f}", quartiles(ratio) if ratio else "", document["lost"][side], voxels))
    head = ("", "requests a second", "times stock: quartiles of the rounds", "lost", "voxels different from stock")
    kinds = "; ".join(f"{count} of {kind}" for kind, count in document["requests"].items())
    notes = f"{sum(document['requests'].values())} distinct images: {kinds}. {document['workers']} workers."
    return f"{table(head, rows)}\n\n{notes}\n\n{source('throughput')}"


def fairness() -> str:
    """A small case beside large ones."""
    rows = []
    for name, case in load("fairness")["cases"].items():
        more = "more than " if case["is_lower_bound"] else ""
        whole = seconds(case["seconds"]["median"]) if "seconds" in case else ""
        rows.append((small_case(name), len(case["repetitions"]), whole, f"{more}{seconds(case['p95_seconds'])}"))
    return table(("a small case", "requests", "median", "p95"), rows) + "\n\n" + source("fairness")


def gap() -> str:
    """What the engine idles between passes."""
    rows = [
        (
            "small, 4 classes" if name == "small" else name,
            seconds(network["forward_seconds"]["median"]),
            percent(network["gap_p95_of_a_forward_pass"]),
            percent(network["gaps_share_of_all_time"]),
        )
        for name, network in load("gap")["networks"].items()
    ]
    head = ("network", "a forward pass", "gap before the next (p95), of a pass", "all gaps, of all time")
    return table(head, rows) + "\n\n" + source("gap")


def engine_memory() -> str:
    """What engine and workers take."""
    document = load("engine_memory")
    rows = []
    for name, network in document["networks"].items():
        few, many = network["servers"]
        rows.append(
            (
                f"{name}: {network['weights_mib']:.0f} MiB of weights",
                f"{few['loaded']['engine_uss_mib']:.0f}",
                f"{median(many['loaded']['workers_uss_mib']):.0f}",
                f"{network['a_further_worker_adds_mib']:.0f}",
            )
        )
    steps = {step["step"]: step["uss_mib"] for step in document["what_a_worker_is_made_of"]}
    head = ("network, all five folds", "engine, MiB", "idle worker, MiB", "a further worker adds, MiB")
    respawn = document["respawn"]["spread_seconds"]
    notes = (
        f"Of a worker's memory, {steps['torch']:.0f} MiB are Python and PyTorch. A killed engine of the small network "
        f"is replaced in {seconds(respawn['median'])} (quartiles {seconds(respawn['q1'])} to {seconds(respawn['q3'])})."
    )
    return f"{table(head, rows)}\n\n{notes}\n\n{source('engine_memory')}"


def growth() -> str:
    """How a worker grows."""
    document = load("memory")
    sizes = [document[f"{window}_window_mean_bytes"] for window in ("first", "last")]
    window, count = document["window_requests"], len(document["statuses"])
    row = (count, f"{document['workers']}", *(f"{size / 1e6:.1f} MB" for size in sizes), percent(document["growth"]))
    head = ("requests", "workers", f"mean of the first {window}", f"mean of the last {window}", "growth")
    return table(head, [row]) + "\n\n" + source("memory")


def gpu_serving() -> str:
    """A server on a GPU."""
    document = load("gpu_serving")
    rounds = document["rounds"]
    ratios = [each["ratio"] for each in rounds]
    volumes = document["volumes"]
    row = (
        f"{volumes['count']} of {shape(volumes['shape'])}",
        document["clients"],
        seconds(median(each["ours_s"] for each in rounds)),
        seconds(median(each["stock_s"] for each in rounds)),
        f"{times(median(ratios))} ({times(min(ratios))} to {times(max(ratios))})",
    )
    head = ("images", "clients", "server, in all", "stock, loaded, in all", "times sooner: median (range of rounds)")
    return table(head, [row]) + "\n\n" + source("gpu_serving")


def export() -> str:
    """Logits to labels."""
    rows = []
    for case in load("export")["cases"].values():
        size = f"{shape(case['logits'][1:])} → {shape(case['output'])}" if "logits" in case else ""
        stock = case["extra_bytes"].get("stock")
        about = "about " if "stock" in case else ""
        rows.append(
            (
                case["title"],
                size,
                about + seconds(case["stock_seconds"]["median"]),
                seconds(case["our_seconds"]["median"]),
                quartiles(case["ratio"]) if "ratio" in case else "",
                "does not fit" if stock is None else mib(stock),
                mib(case["extra_bytes"]["ours"]),
                percent(case["mixed_share"]) if "mixed_share" in case else "",
                _different(case),
            )
        )
    head = (
        "logits", "network's grid → image", "stock", "here", "times sooner, quartiles", "extra MiB: stock", "here",
        "cells interpolated", "voxels different",
    )  # fmt: skip
    return table(head, rows) + "\n\n" + source("export")


def _different(case: Mapping[str, Any]) -> object:
    return case.get("different_voxels", case.get("class_by_class", {}).get("different_voxels", "not compared"))


def approximate() -> str:
    """What the export methods that are not exact change."""
    rows = []
    for case in load("export")["cases"].values():
        for method, found in case.get("approximate", {}).items():
            if method != "exact":
                exact = case["approximate"]["exact"]
                rows.append(
                    (
                        case["title"],
                        f"`{method}`",
                        seconds(found["seconds"]["median"]),
                        seconds(exact["seconds"]["median"]),
                        f"{1e5 * found['changed_share_of_voxels']:,.0f}",
                        f"{found['mean_dice_with_stock']:.4f}",
                    )
                )
    head = ("logits", "method", "takes", "`exact` takes", "voxels changed, of 100,000", "mean Dice with stock")
    return table(head, rows) + "\n\n" + source("export")


def preprocess() -> str:
    """An image onto the network's grid."""
    document = load("preprocess")
    rows = [
        (
            case["title"].replace(" x ", " × "),
            seconds(case["stock_seconds"]["median"]),
            seconds(case["our_seconds"]["median"]),
            quartiles(case["ratio"]),
            mib(case["stock_extra_bytes"]),
            mib(case["our_extra_bytes"]),
            f"{case['different_voxels']} of {case['voxels']:,}",
        )
        for case in document["cases"].values()
    ]
    head = (
        "one channel", "stock", "here", "times sooner, quartiles", "extra MiB: stock", "here", "voxels different",
    )  # fmt: skip
    return table(head, rows) + "\n\n" + source("preprocess")


def reading() -> str:
    """Images to voxels."""
    found = load("codecs")
    rows = []
    for kind, title in _CODECS.items():
        case, peak = found["decode"]["ct"][kind], found["decode_memory"][kind]["peak_volumes"]
        nibabel = case["ratio"].get("nibabel")
        rows.append(
            (
                title,
                f"{case['file_bytes'] / 1e6:.0f} MB",
                seconds(case["seconds"]["ours"]["median"]),
                times(case["ratio"]["nnU-Net"]["median"]),
                times(nibabel["median"]) if nibabel else "",
                f"{peak['ours']:.1f}, {peak['nnU-Net']:.1f}",
            )
        )
    head = ("read", "file", "here", "nnU-Net, times as long", "nibabel, times as long", "peak volumes: here, nnU-Net")
    return table(head, rows) + "\n\n" + source("codecs")


def writing() -> str:
    """Label maps to files."""
    rows = []
    for kind, case in load("codecs")["encode"]["ct"][_ALL_CLASSES].items():
        if "nnU-Net" in case["ratio"]:
            nibabel = case["ratio"].get("nibabel")
            sizes = [f"{case['bytes'][side] / 1e6:.1f}" for side in ("ours", "nnU-Net")]
            rows.append(
                (
                    kind,
                    seconds(case["seconds"]["ours"]["median"]),
                    times(case["ratio"]["nnU-Net"]["median"]),
                    times(nibabel["median"]) if nibabel else "",
                    ", ".join(sizes),
                )
            )
    head = ("write", "here", "nnU-Net, times as long", "nibabel, times as long", "MB: here, nnU-Net")
    return table(head, rows) + "\n\n" + source("codecs")


def path() -> str:
    """The memory on the way from a body to the network."""
    rows = [(way["title"], f"{way['peak_volumes']:.1f}") for way in load("codecs")["path"].values()]
    return table(("from body to network", "peak beside the body, float32 volumes"), rows) + "\n\n" + source("codecs")


def in_service() -> str:
    """What else was measured on a server in use."""
    rows = [*_faults(), *_service(), *_reuse(), *_idle()]
    return table(("", "measured", "result file"), rows)


def _faults() -> Iterator[tuple[str, str, str]]:
    soak = load("soak")
    wrong = soak["wrong"] + len(soak["failed"]) + soak["hung"]
    what = f"{soak['answered']:,} requests while {len(soak['kills'])} engines and workers are killed"
    yield what, f"{wrong} lost or wrong, {soak['held_when_quiet'] + len(soak['left_over'])} left over", link("soak")


def _service() -> Iterator[tuple[str, str, str]]:
    service, file = load("service"), link("service")
    rollout, refusals, progress = service["rollout"], service["admission"]["refusals"], service["progress"]
    what = f"a new version under {rollout['clients']} clients, {rollout['sent']} requests"
    drained = f"a drain took at most {seconds(max(rollout['drain_seconds']))}"
    yield what, f"{rollout['lost']} lost, {rollout['wrong']} wrong; {drained}", file
    added = next(each["measured"] for each in service["targets"] if each["claim"].startswith("admission and metrics"))
    yield "admission and metrics add to a request", f"{added:.1f} ms", file
    paced = "refused requests at a pace"
    yield "a refusal (429) comes after", seconds(refusals["refusals"][paced]["ms"]["median"] / 1000), file
    slower = percent(refusals["slower_than_alone"][paced]["median"])
    yield "10 refusals a second make the network of the case in flight slower by", slower, file
    least, most = (f"{each:.2f}" for each in progress["throughput_ratio_median_95_percent"])
    yield "throughput with progress events, times that without (95 % certain)", f"{least} to {most}", file


def _reuse() -> Iterator[tuple[str, str, str]]:
    reuse, file = load("reuse"), link("reuse")
    for size, case in reuse["cache"].items():
        share = percent(case["before_the_network_of_the_first"]["median"])
        yield f"the same image at {size} again, with the cache: decode and preprocess, of the first time", share, file
    flight = reuse["single_flight"]
    what = f"{flight['requests_at_once']} equal requests at once, computed once: times sooner"
    yield what, times(flight["times_sooner"]["median"]), file


def _idle() -> Iterator[tuple[str, str, str]]:
    idle = load("idle")
    what = f"an idle model with {idle['weights_mib']:.0f} MiB of weights gives back"
    later = f"its next request takes {seconds(idle['loading_adds_seconds'])} longer"
    yield what, f"{idle['given_back_mib']:.0f} MiB; {later}", link("idle")


def client() -> str:
    """What the Python client and the folder command were measured at."""
    return table(("", "measured", "result file"), [*_folder(), *_outage(), *_footprint(), *_transfer(), *_priority()])


def _folder() -> Iterator[tuple[str, str, str]]:
    folder, file = load("folder"), link("folder")
    cases = sum(folder["cases"].values())
    sides = [each["seconds"]["median"] for each in folder["sides"].values()]
    what = f"a folder of {cases} mixed cases by `nnunet-torchserve predict`, and by `nnUNetv2_predict_from_modelfolder`"
    yield what, f"{seconds(sides[1])}, {seconds(sides[0])}: {_spread_of(folder['ratio'])} times sooner", file
    yield "its first result, times sooner", _spread_of(folder["ratio_of_first_results"]), file
    yield "four parts at once, times one call's time", _spread_of(folder["ratio_of_parts_to_one_call"]), file


def _outage() -> Iterator[tuple[str, str, str]]:
    outage = load("outage")
    cases, different = sum(outage["cases"].values()), _measured(outage, "voxels that differ")
    away = seconds(outage["server_away_seconds"][0])
    what = f"a folder of {cases} while the server is killed and started again (away for {away})"
    there = _measured(outage, "label maps of")
    yield what, f"{there:.0f} label maps, {different:.0f} voxels different", link("outage")


def _footprint() -> Iterator[tuple[str, str, str]]:
    footprint, file = load("footprint"), link("footprint")
    counts = footprint["cases"]
    what = f"the command's peak memory with {counts['many']} cases, times that with {counts['few']}"
    yield what, _spread_of(footprint["growth_of_rounds"]), file
    import_s = footprint["import_seconds"]["RemotePredictor"]["median"]
    yield "`from nnunet_torchserve_client import RemotePredictor`", seconds(import_s), file


def _transfer() -> Iterator[tuple[str, str, str]]:
    transfer = load("transfer")
    what = f"{transfer['bytes']['image'] / 1e6:.0f} MB there and back by the client, times curl's time"
    yield what, _spread_of(transfer["ratio"]), link("transfer")


def _priority() -> Iterator[tuple[str, str, str]]:
    found = load("priority")
    what = "p95 of a small interactive case beside a folder of large batch cases, times that alone"
    yield what, f"{_measured(found, 'beside a folder of batch cases'):.2f}", link("priority")


def _measured(result: Mapping[str, Any], claim: str) -> float:
    return float(next(each["measured"] for each in result["targets"] if claim in each["claim"]))


def _spread_of(found: Mapping[str, Any]) -> str:
    """Median and quartiles."""
    return f"{found['median']:.2f} ({found['q1']:.2f} to {found['q3']:.2f})"


BLOCKS: dict[str, Callable[[], str]] = {
    block.__name__: block
    for block in (
        command, whole_request, recipes, overhead, throughput, fairness, gap, engine_memory, growth, gpu_serving,
        export, approximate, preprocess, postprocess, reading, writing, path, client, in_service,
        backend_patches, backend_requests, backend_mixture, backend_accuracy, backend_cold_start,
        dicom_reading, dicom_writing, dicom_series,
        region_work, region_epochs, distill_dice, distill_costs, image_start,
    )
}  # fmt: skip
"""Every table by the name that stands in the page's marker."""
