"""`python -m prunectl`, and what torchrun launches."""

from prunectl.cli import main

main()
