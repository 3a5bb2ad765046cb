"""The command line: parses, calls a workflow, prints. It imports no torch, so that help and lists come at once.

app.py      the program `prunectl` and its help
options.py  what several verbs take, as records that a verb's signature names once
names.py    what can be listed and completed
train.py, find_ticket.py, sfw_prune.py, export.py, bench.py, look.py   the verbs; training.py is what the first three share
output.py   where a verb's lines and its JSON document go
process.py  one process: signals, and an exit status and one sentence for every error
"""

from prunectl.cli.process import main

__all__ = ["main"]
