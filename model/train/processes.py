"""The processes of a training: their place, what they agree on, what they can compute, and how they are stopped."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed, nn

from sgclassify.stages.errors import UsageError


@dataclass(frozen=True)
class Place:
    """Where a process trains: its rank, the number of processes, and its device."""

    rank: int
    world: int
    device: torch.device

    def agreed(self, *values: float) -> list[float]:
        """The largest of each number over the processes."""
        if self.world == 1:
            return list(values)
        together = torch.tensor(values, device=self.device, dtype=torch.float64)
        distributed.all_reduce(together, distributed.ReduceOp.MAX)
        found: list[float] = together.tolist()
        return found


@contextmanager
def joined(device: str) -> Iterator[Place]:
    """Place of this process, in the group that torchrun made if there is one."""
    try:
        where = torch.device(device)
    except RuntimeError:
        raise UsageError(f"there is no device {device}: give cpu or cuda") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"no GPU that PyTorch can use is here: --device {device}")
    if "WORLD_SIZE" not in os.environ:
        yield Place(0, 1, where)
        return
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(where)
    # the first process validates alone, and the others wait for it
    distributed.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=timedelta(hours=1))
    try:
        yield Place(distributed.get_rank(), distributed.get_world_size(), where)
    finally:
        distributed.destroy_process_group()


@contextmanager
def termination() -> Iterator[threading.Event]:
    """An event that SIGTERM sets."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


def computes_bf16() -> bool:
    """Whether this CPU can train in bfloat16.

    oneDNN has no recurrent layer in bfloat16 for processors without AVX-512, and fails when it is asked for one. This
    tries a tiny layer, forwards and backwards, which works for any processor and any build of torch.
    """
    # the trial draws random weights, and must not change the random numbers of the caller
    with torch.random.fork_rng(devices=[]):
        layer = nn.LSTM(2, 2, batch_first=True, bidirectional=True)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, _ = layer(torch.zeros(1, 2, 2))
        out.float().sum().backward()
    except RuntimeError:
        return False
    return True
