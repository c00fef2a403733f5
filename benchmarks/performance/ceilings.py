"""What the machine can do at most: ``python -m performance.ceilings REPEAT FILE...``. Prints JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

SIDE = 2048
BLOCK = 1 << 20


def matrix_product(threads: int, repeat: int) -> list[float]:
    """GFLOP/s of products of float32 matrices."""
    torch.set_num_threads(threads)
    a, b = torch.rand(SIDE, SIDE), torch.rand(SIDE, SIDE)
    torch.mm(a, b)
    rates = []
    for _ in range(repeat):
        start = time.perf_counter()
        for _ in range(4):
            torch.mm(a, b)
        rates.append(4 * 2 * SIDE**3 / (time.perf_counter() - start) / 1e9)
    return rates


def sequential_read(files: list[Path], repeat: int, cold: bool) -> list[float]:
    """MB/s of reading files from their beginning to their end; ``cold``: not from the system's cache."""
    rates = []
    for _ in range(repeat):
        if cold:
            for path in files:
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start, size = time.perf_counter(), 0
        for path in files:
            with path.open("rb", buffering=0) as stream:
                while block := stream.read(BLOCK):
                    size += len(block)
        rates.append(size / (time.perf_counter() - start) / 1e6)
    return rates


def copy_to_gpu(repeat: int, pinned: bool) -> list[float]:
    """GB/s of copies of 256 MiB to the GPU."""
    source = torch.empty(1 << 26, dtype=torch.float32, pin_memory=pinned)
    target = torch.empty_like(source, device="cuda")
    rates = []
    for _ in range(repeat + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        rates.append(source.numel() * 4 / (time.perf_counter() - start) / 1e9)
    return rates[1:]


def main() -> None:
    """Measure, print."""
    repeat, files = int(sys.argv[1]), [Path(name) for name in sys.argv[2:]]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = {
        "matrix product, one thread": ("GFLOP/s", matrix_product(1, repeat)),
        "matrix product, all threads": ("GFLOP/s", matrix_product(cores, repeat)),
        "sequential read, cached": ("MB/s", sequential_read(files, repeat, cold=False)),
    }
    if hasattr(os, "posix_fadvise"):
        found["sequential read, from disk"] = ("MB/s", sequential_read(files, repeat, cold=True))
    if torch.cuda.is_available():
        found["copy to the GPU, pinned"] = ("GB/s", copy_to_gpu(repeat, pinned=True))
        found["copy to the GPU, pageable"] = ("GB/s", copy_to_gpu(repeat, pinned=False))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
