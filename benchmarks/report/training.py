"""The tables of training: region targets that leave the loader packed, and a student beside its teacher."""

from __future__ import annotations

from benchmarks.report.results import (
    load,
    median_and_quartiles,
    percent,
    quartiles,
    seconds,
    shape,
    source,
    table,
)

_STOCK = "stock"


def region_work() -> str:
    """What the loader does with the labels of a sample, and what it ships."""
    rows = []
    for work in load("region_loader")["work"].values():
        size = f"{work['regions']} regions, {shape(work['shape'])}, {work['labels']} labels, {work['scales']} scales"
        for way in (_STOCK, "label map", "bit mask"):
            found = work[way]
            mine = way != _STOCK
            rows.append(
                (
                    size,
                    way,
                    seconds(found["seconds"]["median"] / 1000),
                    quartiles(found["ratio"]) if mine else "",
                    f"{found['bytes'] / 1e6:.1f}",
                    percent(found["bytes_share"]) if mine else "",
                    found["different_voxels"] if mine else "",
                )
            )
    head = (
        "sample", "what is shipped", "work", "times less than stock, quartiles", "MB to the device", "of stock's",
        "voxels different",
    )  # fmt: skip
    return table(head, rows) + "\n\n" + source("region_loader")


def region_epochs() -> str:
    """Epochs on a CPU, and how much of them waits for data."""
    rows = []
    for count, epochs in load("region_loader")["epochs"].items():
        for setting in ("a process of its own", "the network's process"):
            rows += [
                (
                    count,
                    setting,
                    way,
                    seconds(found["epoch_seconds"]["median"]),
                    percent(found["epoch_share_of_stock"]),
                    percent(found["waiting_share"]["median"]),
                )
                for way, found in epochs[setting].items()
            ]
    head = ("regions", "augmentation in", "what is shipped", "epoch", "of stock's", "waits for data")
    return table(head, rows) + "\n\n" + source("region_loader")


def distill_dice() -> str:
    """How well teacher and students segment."""
    document = load("distill")
    rows = [
        (model, *(f"{value:.3f}" for value in found["structures"].values()), f"{found['mean']:.3f}")
        for model, found in document["dice"].items()
    ]
    first = next(iter(document["dice"].values()))
    head = (f"Dice, mean of {len(first['cases'])} held-out cases", *first["structures"], "mean")
    return f"{table(head, rows)}\n\n{document['cases'].capitalize()}.\n\n{source('distill')}"


def distill_costs() -> str:
    """What a student costs beside one fold of its teacher, and beside all."""
    document = load("distill")
    rows = []
    for model, size in document["archive_bytes"].items():
        cost = document["costs"].get(model)
        batches = [each["patches_per_second"].get(model) for each in document["patches"]["batches"].values()]
        rows.append(
            (
                model,
                f"{cost['parameters']:,}" if cost else "",
                f"{cost['operations'] / 1e9:.2f}" if cost else "",
                *(median_and_quartiles(speed) if speed else "" for speed in batches),
                *(seconds(case["seconds"][model]["median"]) for case in document["requests"].values()),
                f"{size / 1e6:.2f}",
            )
        )
    images = [f"warm request, {name}" for name in document["requests"]]
    speeds = [f"patches a second, {batch} in a pass (quartiles)" for batch in document["patches"]["batches"]]
    head = ("", "parameters", "GFLOP a patch", *speeds, *images, "archive, MB")
    return table(head, rows) + "\n\n" + source("distill")
