"""What the dispatcher and the scheduler cost: ``python -m performance.scheduler TILES WORKERS``. Prints JSON.

Tiles with nothing in them go through the run's own dispatcher, three tasks each, on the run's own embedded cluster.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sgclassify.pipeline.cluster.dispatch import dispatch
from sgclassify.pipeline.cluster.handle import open_cluster
from sgclassify.pipeline.config import RunConfig
from sgclassify.pipeline.phases import EXTRACT_PRIORITY, INFER_PRIORITY, PUBLISH_PRIORITY


def nothing(tile: int, *_: Any) -> int:
    """A task that is done at once."""
    return tile


def measure(n_tiles: int, workers: int, scratch: Path) -> dict[str, float]:
    """Seconds of that many tiles without content."""
    config = RunConfig(device="cpu")
    (scratch / "shared").mkdir()
    options = {"scheduler": None, "n_workers": workers, "scratch": scratch / "dask", "shared": scratch / "shared"}
    with open_cluster(config, **options) as cluster:  # type: ignore[arg-type]
        cpu, inference = cluster.cpu, cluster.inference

        def submit(tile: int) -> Any:
            stamps = cluster.submit(nothing, tile, resources=cpu, priority=EXTRACT_PRIORITY)
            scored = cluster.submit(nothing, tile, stamps, resources=inference, priority=INFER_PRIORITY)
            return cluster.submit(nothing, tile, scored, resources=cpu, priority=PUBLISH_PRIORITY)

        # the workers are up once each has done something
        for _ in dispatch(cluster, range(4 * workers), submit, 4 * workers):
            pass
        start, cpu_start = time.monotonic(), time.process_time()
        done = sum(1 for _ in dispatch(cluster, range(n_tiles), submit, config.window * cluster.n_slots))
        wall, own = time.monotonic() - start, time.process_time() - cpu_start
    if done != n_tiles:
        raise RuntimeError(f"{done} of {n_tiles} tiles came back")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"tiles": n_tiles, "wall_s": wall, "driver_cpu_s": own, "driver_mib": peak}


def main() -> None:
    """Measure, print."""
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]), Path(name))))


if __name__ == "__main__":
    main()
