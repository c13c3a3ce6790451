"""The option for where workers run: on this machine or on a Ray cluster."""

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
    """A function that starts the workers of a job; raises `Refused` when the Ray cluster cannot be reached."""
    name, _, address = cluster.partition(":")
    if name != RAY:
        return partial(local.start_workers, count=workers)
    refuse_ray_without_library(cluster)
    on_ray.connect(address or None)
    return partial(on_ray.start_workers, count=workers)


def refuse_ray_without_library(cluster: str) -> None:
    """Raise `Refused` when workers are to run on Ray and it is not installed."""
    if cluster.partition(":")[0] == RAY and find_spec("ray") is None:
        raise Refused(f"cluster = {cluster}: ray is not installed - pip install 'sollune[ray]'")
