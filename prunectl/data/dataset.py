"""A data set as training sees it: batches of normalised images whose order is a pure function of (seed, epoch).

Images live in a pool (memory or files), a split is a set of positions in it, and a `Request` names the positions of one
batch. Whoever computes the batch, this process or a worker, gets the same pixels. No global random state is touched."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunectl.data.draws import Index, Stream, permutation
from prunectl.data.images import Pixels, fitted, normalised
from prunectl.errors import DataMissing, UnknownName, UsageError

Batch = tuple[Tensor, Tensor]
SAMPLE_CHUNK = 64


@dataclass(frozen=True)
class DatasetInfo:
    """What a network, a report or a device needs to know about its input.

    image_size: H = W of what the network sees. fit: how an image gets there: `none`; `pad` (black border); `resize`
    (bilinear, the whole square image); `resize-crop` (photos: shorter side to image_size * 256/224, then the centre).
    native: H = W of the images before that; of photos, which have every size, image_size. mean, std: per channel, of
    pixels / 255. augment: what training images undergo besides."""

    name: str
    classes: tuple[str, ...]
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: str
    n_train: int
    n_val: int
    n_test: int
    augment: str
    native: int

    def to_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> DatasetInfo:
        parsed: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        return cls(**parsed)


@dataclass(frozen=True)
class Augmentation:
    """How the training images of one epoch are changed; each image's share of chance hangs on its position alone."""

    policy: str  # none, flip, crop, crop-flip, imagenet
    seed: int
    epoch: int


@dataclass(frozen=True)
class Request:
    """One batch to make: positions in the pool and, for training, what to do to the images."""

    index: Index
    augmentation: Augmentation | None


class Pool(Protocol):
    """Every image of a data set, addressed by position."""

    @property
    def labels(self) -> Index: ...

    def crops(self, index: Index, augmentation: Augmentation | None) -> Pixels:
        """uint8 (len(index), C, S, S), all of the pool's own size S."""
        ...

    def fingerprint(self) -> str:
        """Differs where labels or images do; of photos, where their names do."""
        ...


@dataclass(frozen=True)
class View:
    """A pool through the network's eyes; what workers hold."""

    pool: Pool
    image_size: int
    fit: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __getitem__(self, request: Request) -> Batch:
        pixels = torch.from_numpy(self.pool.crops(request.index, request.augmentation))
        images = normalised(fitted(pixels, self.image_size, self.fit), self.mean, self.std)
        return images, torch.from_numpy(self.pool.labels[request.index])


@dataclass(frozen=True)
class Dataset:
    """Batches (x float32 (N, C, H, W) normalised, y int64 (N,)) of the splits train, val and test.

    Split sizes and everything else about the input are in `info`. `stream` turns requests into batches, in order.
    fingerprint: see Pool. missing: why the images are blank, if they are."""

    info: DatasetInfo
    splits: Mapping[str, Index]
    stream: Callable[[Sequence[Request]], Iterator[Batch]]
    fingerprint: Callable[[], str]
    missing: str | None = None

    def train_batches(
        self, epoch: int, *, batch_size: int, seed: int, rank: int = 0, world: int = 1, drop_last: bool = True
    ) -> Iterator[Batch]:
        """One epoch's augmented batches of this rank; `batch_size` counts the images of one rank.

        Ranks get disjoint shards of equal length (up to world - 1 images, others in each epoch, sit out). The same
        arguments give the same batches, bit for bit. Raises UsageError if not even one full batch can be made."""
        steps = self.train_steps(batch_size=batch_size, world=world, drop_last=drop_last)
        split = self.splits["train"]
        order = split[permutation((Stream.ORDER, seed, epoch), len(split))]
        shard = order[: len(order) - len(order) % world][rank::world]
        augmentation = Augmentation(self.info.augment, seed, epoch)
        return self.stream([Request(chunk, augmentation) for chunk in _chunks(shard, batch_size)[:steps]])

    def train_steps(self, *, batch_size: int, world: int = 1, drop_last: bool = True) -> int:
        """How many batches `train_batches` yields for each epoch and rank."""
        shard = self.info.n_train // world
        steps = shard // batch_size if drop_last else -(-shard // batch_size)
        if steps == 0:
            each = f" for each of {world} processes" if world > 1 else ""
            raise UsageError(f"train.batch_size = {batch_size}: there are only {shard} training images{each}; choose a smaller batch.")
        return steps

    def eval_batches(self, split: str, *, batch_size: int, limit: int | None = None, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Each image of a split once over all ranks, in fixed order, without augmentation; the last batch may be short.

        limit: at most this many images, always the same ones, in an order that mixes the classes, as a statistic of single
        batches wants them; without it they come as the data set lists them. Shards of ranks are disjoint and
        complete, so their lengths may differ by one: reduce sums, not means."""
        index = self._positions(split)
        if limit is not None:
            index = index[permutation((Stream.LIMIT,), len(index))[:limit]]
        return self.stream([Request(chunk, None) for chunk in _chunks(index[rank::world], batch_size)])

    def sample(self, n: int, *, seed: int, split: str = "train") -> Batch:
        """`n` images of a split without augmentation (all of them if it has fewer), the same for the same seed."""
        index = self._positions(split)
        chosen = index[permutation((Stream.SAMPLE, seed), len(index))[:n]]
        parts = list(self.stream([Request(chunk, None) for chunk in _chunks(chosen, SAMPLE_CHUNK)]))
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    def _positions(self, split: str) -> Index:
        if split not in self.splits:
            raise UnknownName("split", split, self.splits)
        if len(self.splits[split]) == 0:
            raise DataMissing(f"{self.info.name} has no {split} images.")
        return self.splits[split]


def sha256_of(*arrays: NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _chunks(index: Index, size: int) -> list[Index]:
    return [index[start : start + size] for start in range(0, len(index), size)]
