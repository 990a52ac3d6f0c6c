"""Draw docs/figures/*.svg and write the tables of docs/performance.md from the result files: ``make figures``."""

from __future__ import annotations

from benchmarks.report.figures import FIGURES, FOLDER
from benchmarks.report.page import PAGE, rewritten


def main() -> None:
    """Write what has changed."""
    FOLDER.mkdir(exist_ok=True)
    for name, figure in FIGURES.items():
        figure.save(FOLDER / f"{name}.svg")
    PAGE.write_text(rewritten(PAGE.read_text()))


if __name__ == "__main__":
    main()
