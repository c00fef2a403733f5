"""The naive pipeline as a command: ``python -m performance.naive LIST OUTPUT PRODUCT``. Prints JSON.

Compares its answers with the products of a run of the same list.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np

from performance.agreement import agreement, objects_of
from performance.naive.pipeline import run


def main() -> None:
    """Run, compare, print."""
    listed, output, product = (Path(name) for name in sys.argv[1:4])
    start = time.monotonic()
    found = run(listed, output)
    wall = time.monotonic() - start
    same = agreement(objects_of(product), (found.ra, found.dec, found.p_star.astype(np.float64)))
    answer = {"wall_s": wall, "cpu_s": found.seconds, "objects": len(found.ra), "network": found.network}
    print(json.dumps(answer | {"agreement": dataclasses.asdict(same)}))


if __name__ == "__main__":
    main()
