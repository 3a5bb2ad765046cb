"""python -m benchmarks: the short measurements in turn (minutes, on an otherwise idle machine). The long
comparisons are `python -m benchmarks.tickets` and `python -m benchmarks.sfw`."""

from __future__ import annotations

from importlib import import_module

for name in ("startup", "train_loop", "cpu_training", "probe", "surgery", "sfw_step"):
    import_module(f"benchmarks.{name}").main()
