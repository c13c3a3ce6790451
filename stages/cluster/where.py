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
    """What starts so many workers there; raises `Refused` when Ray is asked for and not installed."""
    name, _, address = cluster.partition(":")
    if name != RAY:
        return partial(local.start, count=workers)
    if find_spec("ray") is None:
        raise Refused(f"cluster = {cluster}: ray is not installed - pip install 'sollune[ray]'")
    return partial(on_ray.start, count=workers, address=address or None)
