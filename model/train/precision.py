"""Which precision the processor can train in."""

from __future__ import annotations

import torch
from torch import nn


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
