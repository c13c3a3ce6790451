"""The one knob for where workers run."""

from collections.abc import Callable
from functools import partial

from stages.cluster import local, on_ray
from stages.cluster.fleet import Worker
from stages.cluster.tasks import Job

HERE, RAY = "here", "ray"
WHERE = rf"^({HERE}|{RAY}(:.+)?)$"


def starter(cluster: str, workers: int) -> Callable[[Job], list[Worker]]:
    """What starts so many workers there."""
    name, _, address = cluster.partition(":")
    if name == RAY:
        return partial(on_ray.start, count=workers, address=address or None)
    return partial(local.start, count=workers)
