"""Batches made by worker processes ahead of time: torch's DataLoader, fed with requests instead of indices.

A set of workers stays alive between epochs and serves any split; a stream that starts while another is still running
gets its own. A DataMissing crosses the process boundary as its sentence, not as a traceback."""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from prunectl.data.dataset import Batch, Request, View
from prunectl.errors import DataMissing, UsageError

MAX_DEFAULT_WORKERS = 8


def default_workers() -> int:
    """One worker for each CPU this process may use, at most eight, shared between the processes of one torchrun."""
    share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(share, MAX_DEFAULT_WORKERS))


class _Guarded(TorchDataset[Any]):
    """The view, with DataMissing returned instead of raised: torch would wrap it into a page of traceback."""

    def __init__(self, view: View) -> None:
        self.view = view

    def __getitem__(self, request: Request) -> Batch | str:
        try:
            return self.view[request]
        except DataMissing as missing:
            return str(missing)


class WorkerStream:
    """requests -> batches, in order, made by `workers` processes that are started when first needed."""

    def __init__(self, view: View, workers: int) -> None:
        self._view = view
        self._workers = workers
        self._idle: list[tuple[DataLoader[Any], list[Request]]] = []
        self._alive: list[DataLoader[Any]] = []
        # A loader that dies in a cycle of garbage may find its queues closed before it can tell its workers to stop, and
        # then waits five seconds for each. Held from here, by the list alone, loaders die one at a time and at once.
        weakref.finalize(self, self._alive.clear)

    def __call__(self, requests: Sequence[Request]) -> Iterator[Batch]:
        loader, queue = self._idle.pop() if self._idle else self._start()
        queue[:] = requests
        try:
            for made in loader:
                if isinstance(made, str):
                    raise DataMissing(made)
                yield made
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as problem:  # what a dead worker looks like
            if isinstance(problem, RuntimeError) and "DataLoader worker" not in str(problem):
                raise
            self._alive.remove(loader)
            raise UsageError(
                "a data-loading process died, most often for want of memory or shared memory: "
                "add --workers 0, or give the container more (docker run --shm-size=8g)."
            ) from problem
        finally:
            if loader in self._alive:
                self._idle.append((loader, queue))  # what an unfinished stream left behind is discarded on the next start

    def _start(self) -> tuple[DataLoader[Any], list[Request]]:
        queue: list[Request] = []
        loader = DataLoader(
            _Guarded(self._view),
            batch_size=None,  # a request already is a batch
            sampler=queue,
            num_workers=self._workers,
            persistent_workers=True,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_as_it_is,
            worker_init_fn=_leave_interrupts_to_the_parent,
            generator=torch.Generator(),  # without one, DataLoader draws from the global generator
        )
        self._alive.append(loader)
        return loader, queue


def _as_it_is(made: Any) -> Any:
    return made


def _leave_interrupts_to_the_parent(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
