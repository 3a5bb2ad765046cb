"""Trains a traced module for some steps on synthetic images and prints when each began: Python 3.6, torch 1.10 or later.

`trainer.py FILE JOB`, JOB as in PROTOCOL.md. The host sends this text to the agent, which runs it in a process of its own."""

import json
import sys
import time

import torch

path, job = sys.argv[1], json.loads(sys.argv[2])
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
module = torch.jit.load(path, map_location=device).train()
weights = [p for p in module.parameters() if p.requires_grad]
before = [p.detach().clone() for p in weights]
optimizer = torch.optim.SGD(weights, lr=1e-3, momentum=0.9)
x = torch.randn(*job["input_shape"], device=device)
y = torch.randint(job["num_classes"], (job["input_shape"][0],), device=device)
stamps = []
for _ in range(job["warmup_steps"] + job["steps"] + 1):
    if device.type == "cuda":
        torch.cuda.synchronize()
    stamps.append(time.monotonic())
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(module(x), y)
    loss.backward()
    optimizer.step()
assert not all(torch.equal(a, b) for a, b in zip(before, weights)), "no weight moved: trace the module in train() mode"
about = {"loss": float(loss), "torch": torch.__version__, "device": device.type, "threads": torch.get_num_threads()}
print("RESULT " + json.dumps(dict(about, stamps=stamps[job["warmup_steps"] :])))
