"""Shards as tensors in memory, for training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from sgclassify.model.data.shards import read_table_of
from sgclassify.stages.columns import CLASSES
from sgclassify.stages.errors import UsageError


@dataclass
class Rows:
    """Stars and galaxies of some shards as tensors, small enough to hold 10^5 of them.

    Attributes
    ----------
    image, psf : Tensor of float16, shape (n, 7, size, size)
    packed : Tensor of uint8, shape (n, ceil(7 * size * size / 8))
        Bits of the validity mask, the first pixel in the highest bit.
    sigma : Tensor of float32, shape (n, 7)
    features : Tensor of float32, shape (n, 7, n_features)
    present : Tensor of bool, shape (n, 7)
        Bands with a valid pixel.
    label : Tensor of int64, shape (n,)
        0 star, 1 galaxy.
    field : Tensor of int64, shape (n,)
        Number of the shard.
    """

    image: Tensor
    psf: Tensor
    packed: Tensor
    sigma: Tensor
    features: Tensor
    present: Tensor
    label: Tensor
    field: Tensor

    def __len__(self) -> int:
        return len(self.label)

    @property
    def size(self) -> int:
        """Side of the stamps, pixels."""
        return int(self.image.shape[-1])

    @property
    def nbytes(self) -> int:
        """Memory of all tensors, bytes."""
        return sum(value.nbytes for value in vars(self).values())

    def to(self, device: torch.device) -> Rows:
        """The same on a device."""
        return Rows(**{name: value.to(device) for name, value in vars(self).items()})

    def take(self, index: Tensor) -> Rows:
        """Some of the rows."""
        return Rows(**{name: value[index] for name, value in vars(self).items()})

    def batch(self, index: Tensor, device: torch.device) -> list[Tensor]:
        """Network inputs of some rows."""
        image, packed, sigma, features, psf = (
            sent(values[index.to(values.device)], device)
            for values in (self.image, self.packed, self.sigma, self.features, self.psf)
        )
        return [image.float(), unpacked(packed, self.image.shape[1:]), sigma, features, psf.float()]

    def sequence_batch(self, index: Tensor, device: torch.device) -> list[Tensor]:
        """Which bands are present, shape (n, 7), and features of some rows."""
        return [sent(t[index.to(t.device)], device) for t in (self.present, self.features)]


def sent(values: Tensor, device: torch.device) -> Tensor:
    """The same on a device; a GPU takes them while the CPU goes on."""
    if device.type == "cuda" and not values.is_cuda:
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def unpacked(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Masks from their bits, as `numpy.packbits` stores them: bool of shape ``(n, *shape)``."""
    bit = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=packed.device)
    bits = (packed[:, :, None] & bit).ne(0).flatten(1)
    return bits[:, : math.prod(shape)].reshape(len(packed), *shape)


def read_rows(paths: Sequence[Path], rank: int = 0, world: int = 1) -> Rows:
    """Read the training objects of shards: stars and galaxies with at least one band; `UsageError` if there are none.

    Every `world`-th row of a shard is kept; each process, by its `rank`, keeps others.
    """
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda k: _read_shard(paths[k], k, rank, world), range(len(paths))))
    if not sum(len(part["label"]) for part in parts):
        raise UsageError("no shards with stars or galaxies here; make them with `sgclassify dataset`")
    # array by array, so that only one of them at a time is in memory twice
    return Rows(**{name: torch.from_numpy(np.concatenate([p.pop(name) for p in parts])) for name in list(parts[0])})


def _read_shard(path: Path, number: int, rank: int, world: int) -> dict[str, npt.NDArray[Any]]:
    names = ("image", "psf", "sigma", "features")
    table = read_table_of(path, ["true_class", "valid", *names])
    known = pc.index_in(table["true_class"], value_set=pa.array(CLASSES)).fill_null(-1)
    arrays = {name: table[name].combine_chunks().to_numpy_ndarray() for name in names}
    arrays["packed"] = table["valid"].combine_chunks().to_numpy_ndarray()
    bits = np.unpackbits(arrays["packed"], axis=1, count=math.prod(arrays["image"].shape[1:]))
    arrays["present"] = bits.reshape(*arrays["sigma"].shape, -1).any(axis=2)
    arrays["label"] = known.to_numpy().astype(np.int64)
    arrays["field"] = np.full(len(arrays["label"]), number)
    keep = np.flatnonzero((arrays["label"] >= 0) & arrays["present"].any(axis=1))
    return {name: values[keep[(rank + number) % world :: world]] for name, values in arrays.items()}


def cropped(batch: list[Tensor], size: int) -> list[Tensor]:
    """Network inputs with the central `size` pixels of the stamps."""
    image, valid, sigma, features, psf = batch
    first = (image.shape[2] - size) // 2
    middle = (..., slice(first, first + size), slice(first, first + size))
    return [image[middle], valid[middle], sigma, features, psf[middle]]
