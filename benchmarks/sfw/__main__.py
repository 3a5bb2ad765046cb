"""python -m benchmarks.sfw STAGE [--net thin|wide] [--only TEXT] [--runs DIR] [--list]: runs the cells that have no result yet."""

from pathlib import Path

from benchmarks.cells import main
from benchmarks.sfw.cells import STAGES
from benchmarks.sfw.trained import lend

main(STAGES, Path(__file__).parent / "results", str(__doc__), lend)
