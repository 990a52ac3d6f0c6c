"""What daily service costs: a rollout under load, admission and metrics, refusals, and progress events.

Three stories, each on servers of its own: :mod:`.rollout`, :mod:`.admission` and :mod:`.progress` tell them. Whatever
is compared is measured in turns in one run.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.material import find_material
from benchmarks.harness.quiet import wait_for_quiet
from benchmarks.harness.results import Target, write_results
from benchmarks.harness.spread import two_or_more
from benchmarks.load.service import admission, progress, rollout

STORIES = ("rollout", "admission", "progress")


def main() -> int:
    """Measure, write ``results/service.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", nargs="+", choices=STORIES, default=STORIES, help="the result has only these")
    parser.add_argument("--scalings", type=int, default=2, help="how often 4 workers are scaled to 1 and back")
    parser.add_argument("--steady-s", type=float, default=20, help="seconds of load before and after the rollout")
    parser.add_argument("--images-each", type=int, default=2, help="different images of a client of the rollout")
    parser.add_argument("--blocks", type=two_or_more, default=15, help="of small requests, for each side")
    parser.add_argument("--requests-of-a-block", type=two_or_more, default=50)
    parser.add_argument("--refusal-rounds", type=two_or_more, default=9, help="of each side")
    parser.add_argument("--progress-pairs", type=two_or_more, default=15, help="rounds of each side")
    parser.add_argument("--cases-of-a-round", type=int, default=progress.CLIENTS)
    parser.add_argument("--quick", action="store_true", help="do not wait for an idle machine")
    arguments = parser.parse_args()
    quick = arguments.quick
    threads = torch.get_num_threads()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # the servers inherit it
    measured: dict[str, Any] = {"threads": threads}
    targets: list[Target] = []
    with tempfile.TemporaryDirectory(prefix="bench-service-") as folder:
        scratch = Path(folder)
        material = find_material(scratch)
        for story in STORIES:
            if story not in arguments.stories:
                continue
            print(story)
            if not quick:
                wait_for_quiet()
            own = scratch / story
            own.mkdir()
            if story == "rollout":
                measured[story] = rollout.measure(
                    material,
                    own,
                    scalings=arguments.scalings,
                    steady_s=arguments.steady_s,
                    images_each=arguments.images_each,
                )
                targets += rollout.targets_of(measured[story])
            elif story == "admission":
                measured[story] = admission.measure(
                    material,
                    own,
                    blocks=arguments.blocks,
                    requests=arguments.requests_of_a_block,
                    rounds=arguments.refusal_rounds,
                    quick=quick,
                )
                targets += admission.targets_of(measured[story])
            else:
                measured[story] = progress.measure(
                    material, own, pairs=arguments.progress_pairs, cases=arguments.cases_of_a_round, quick=quick
                )
                targets += progress.targets_of(measured[story])
    return write_results("service", material, measured, targets)


if __name__ == "__main__":
    sys.exit(main())
