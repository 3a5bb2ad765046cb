"""python -m benchmarks.tickets.after_training find-ticket ... --sparsity S ...: the classic way, in the place of a ticket.

The dense network is trained to the end of the same schedule, pruned by the same command, and fine-tuned for half as many epochs
at a tenth of the rate. What is printed is the ticket's record, its training FLOPs those of both."""

from __future__ import annotations

import json
import sys

from benchmarks.cells import call

SHARE, RATE = 2, 0.01


def main() -> None:
    words = sys.argv[1:]
    first, last = words.index("--sparsity"), words.index("--out")
    dense = call("prunectl", "train", *words[1:first], *words[last:])
    epochs = int(words[words.index("--epochs") + 1])
    tuned = ("--epochs", str(epochs // SHARE), "--set", f"train.lr={RATE}", "--set", "train.warmup_epochs=0")
    ticket = call("prunectl", *words[:last], *tuned, "--from", dense["run"], "--detector", "epoch:0", *words[last:])
    spent, whole = ticket["training_flops"]["spent"] + dense["training_flops"], dense["training_flops"]
    ticket["training_flops"] = {"spent": spent, "dense": whole, "ratio": spent / whole}
    print(json.dumps(ticket))


if __name__ == "__main__":
    main()
