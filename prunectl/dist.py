"""torch.distributed behind a few helpers. One process alone passes through all of them unchanged.

`torchrun -m prunectl ...` sets RANK, WORLD_SIZE and LOCAL_RANK; every rank then runs the same workflow on its share of
each batch, and only rank 0 writes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as td
from torch import Tensor, nn


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device(name: str) -> torch.device:
    """The device `name`; of several CUDA devices the one that is this rank's."""
    several = name == "cuda" and world_size() > 1
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if several else torch.device(name)


@contextmanager
def group(device: torch.device) -> Iterator[None]:
    """The process group of a torchrun launch, for the block's duration; nothing for a single process."""
    if world_size() == 1 or td.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # 1 x 1 kernels in channels_last: the copy that it warns of costs nothing beside the step
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    td.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        td.destroy_process_group()


def summed(t: Tensor) -> Tensor:
    """The sum of `t` over all ranks, on every rank."""
    if world_size() > 1:
        td.all_reduce(t)
    return t


def told(value: bool) -> bool:
    """Rank 0's value, on every rank."""
    values = [value]
    if world_size() > 1:
        td.broadcast_object_list(values, 0)
    return values[0]


def together() -> None:
    """Every rank is here."""
    if world_size() > 1:
        td.barrier()


def from_rank_0(model: nn.Module) -> None:
    """Parameters and buffers of rank 0 on every rank: batch-norm statistics drift apart between synchronisations."""
    tensors_of_rank_0([*model.parameters(), *model.buffers()])


def tensors_of_rank_0(tensors: Iterable[Tensor]) -> None:
    """Rank 0's values on every rank."""
    if world_size() > 1:
        for t in tensors:
            td.broadcast(t.data, 0)
