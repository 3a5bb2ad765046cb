"""python -m benchmarks.tickets STAGE [--net thin|wide] [--only TEXT] [--runs DIR] [--list]: runs the cells that have no result yet."""

from pathlib import Path

from benchmarks.cells import main
from benchmarks.tickets.cells import STAGES
from benchmarks.tickets.prefix import lend

main(STAGES, Path(__file__).parent / "results", str(__doc__), lend)
