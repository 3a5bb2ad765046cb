"""Latency and joules, of inference and of training: measured on the device, computed on the host.

devices.py measures and returns a RawBench (records.py); report.py makes a BenchReport of it and of nothing else."""
