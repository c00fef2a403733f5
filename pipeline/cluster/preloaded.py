"""What the workers of this machine have imported before they are forked; see `sgclassify.pipeline.cluster.forks`."""

from contextlib import suppress
from importlib import import_module

for _name in ("distributed.nanny", "sgclassify.pipeline.cluster.worker", "sgclassify.pipeline.tasks", "torch"):
    # whatever is wrong with an installation is found, and said, by the driver or by a worker
    with suppress(Exception):
        import_module(_name)
