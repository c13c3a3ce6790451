"""The one knob for where workers run."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

from configs.refusal import Refused
from stages.cluster import local, on_ray
from stages.cluster.fleet import Worker
from stages.cluster.tasks import Job

HERE, RAY = "here", "ray"
WHERE = rf"^({HERE}|{RAY}(:.+)?)$"


def starter(cluster: str, workers: int) -> Callable[[Job], list[Worker]]:
    """What starts so many workers there; raises `Refused` when Ray is asked for and cannot be reached."""
    name, _, address = cluster.partition(":")
    if name != RAY:
        return partial(local.start, count=workers)
    refuse_ray_without_library(cluster)
    on_ray.connect(address or None)
    return partial(on_ray.start, count=workers)


def refuse_ray_without_library(cluster: str) -> None:
    """Raise `Refused` when Ray is asked for and not installed."""
    if cluster.partition(":")[0] == RAY and find_spec("ray") is None:
        raise Refused(f"cluster = {cluster}: ray is not installed - pip install 'sollune[ray]'")
