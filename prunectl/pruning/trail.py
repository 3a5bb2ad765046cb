"""The whole path of the partition: a thin code of every probe, and the distance of each to each.

A detector looks back over a few probes; the trail is for the reader, who wants to see when the network settled."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from prunectl.pruning.spline import ActivationCode, LayerCode, code_distance, from_tensors, to_tensors

MAX_BYTES = 65_536  # of a code: half a million bits, whose share is known to .001
MAX_CODES = 128  # above it every second one goes


class Trail:
    """epochs and codes, oldest first; bounded memory however long the search lasts."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.codes: list[ActivationCode] = []
        self._every, self._seen = 1, 0

    def add(self, epoch: float, code: ActivationCode) -> None:
        self._seen += 1
        if self._seen % self._every:
            return
        self.epochs.append(epoch)
        self.codes.append(thinned(code, MAX_BYTES))
        if len(self.codes) > MAX_CODES:
            self.epochs, self.codes, self._every = self.epochs[1::2], self.codes[1::2], 2 * self._every

    def matrix(self) -> list[list[float]]:
        """Distances between all codes, symmetric, 0 on the diagonal."""
        n = len(self.codes)
        upper = {(i, j): code_distance(self.codes[i], self.codes[j]) for i in range(n) for j in range(i + 1, n)}
        return [[0.0 if i == j else upper[min(i, j), max(i, j)] for j in range(n)] for i in range(n)]

    def state(self) -> dict[str, Tensor]:
        counters = {"epochs": torch.tensor(self.epochs, dtype=torch.float64), "seen": torch.tensor([self._every, self._seen])}
        return {**counters, **to_tensors(self.codes)} if self.codes else {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.codes = from_tensors(state)
        self.epochs = state["epochs"].tolist() if self.codes else []
        self._every, self._seen = state["seen"].tolist() if self.codes else (1, 0)


def thinned(code: ActivationCode, max_bytes: int) -> ActivationCode:
    """`code` with a fixed random part of each layer's units, in whole bytes, at least 8 bytes an image of each layer."""
    if code.nbytes <= max_bytes:
        return code
    share = max_bytes / code.nbytes
    layers = []
    for place, c in enumerate(code.layers):
        whole = c.units // 8
        n = min(whole, max(8, int(c.bits.shape[1] * share)))
        if n == whole:
            layers.append(c)
            continue
        rng = np.random.default_rng(zlib.crc32(f"{place}:{whole}:{n}".encode()))
        columns = torch.from_numpy(np.sort(rng.choice(whole, n, replace=False)))
        layers.append(LayerCode(c.bits[:, columns], 8 * n))
    return ActivationCode(tuple(layers))
