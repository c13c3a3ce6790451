"""Filling a cache: shards are tasks of their own, made in this process, in several here, or on a Ray cluster."""

from stages.cluster.device import device_of
from stages.cluster.fill import fill, refuse_surplus
from stages.cluster.fleet import Worker, fill_by_many
from stages.cluster.records import Make
from stages.cluster.signals import stopping
from stages.cluster.tasks import Job, Task, ranges, tasks_in, tasks_of
from stages.cluster.where import HERE, WHERE, refuse_ray_without_library, starter

__all__ = [
    "HERE",
    "WHERE",
    "Job",
    "Make",
    "Task",
    "Worker",
    "device_of",
    "fill",
    "fill_by_many",
    "ranges",
    "refuse_ray_without_library",
    "refuse_surplus",
    "starter",
    "stopping",
    "tasks_in",
    "tasks_of",
]
