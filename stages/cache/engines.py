"""The one knob for where workers run."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

from stages.cache import local, on_ray
from stages.cache.fill import FillJob
from stages.cache.fleet import Worker
from stages.system.refusal import Refused

HERE, RAY = "here", "ray"
CLUSTER_PATTERN = rf"^({HERE}|{RAY}(:.+)?)$"


def worker_starter(cluster: str, workers: int) -> Callable[[FillJob], list[Worker]]:
    """What starts so many workers there; raises `Refused` when Ray is asked for and cannot be reached."""
    name, _, address = cluster.partition(":")
    if name != RAY:
        return partial(local.start_workers, count=workers)
    refuse_ray_without_library(cluster)
    on_ray.connect(address or None)
    return partial(on_ray.start_workers, count=workers)


def refuse_ray_without_library(cluster: str) -> None:
    """Raise `Refused` when Ray is asked for and not installed."""
    if cluster.partition(":")[0] == RAY and find_spec("ray") is None:
        raise Refused(f"cluster = {cluster}: ray is not installed - pip install 'sollune[ray]'")
