"""Workers on a Ray cluster: each is one long task, and all of them see the run folder under the same path."""

from typing import Any

from stages.cache.fill import FillJob
from stages.cache.fleet import Worker
from stages.system.refusal import Refused


def connect(address: str | None) -> None:
    """Join the cluster at `address`, or start one on this machine; it is left when the process ends.

    Raises `Refused` when there is no cluster.
    """
    import ray  # an optional dependency

    try:
        ray.init(address or "local", log_to_driver=False, logging_level="error", include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Refused(f"cluster = ray:{address}: {reason} - name a running cluster, or plain ray") from error


def start_workers(job: FillJob, count: int) -> list[Worker]:
    """Start `count` tasks that share a job, on the cluster that was joined."""
    import ray

    gpus = int("GPU" in ray.cluster_resources())
    # A task that dies is not started again: the claims give its shards to the others.
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0, scheduling_strategy="SPREAD")(_run_worker)
    return [_worker(ray, f"ray worker {number}", remote.remote(job)) for number in range(count)]


def _worker(ray: Any, name: str, task: Any) -> Worker:
    return Worker(name, task.future(), lambda by_force: ray.cancel(task, force=by_force), _error_text)


def _error_text(error: BaseException) -> str:
    cause = getattr(error, "cause", None)
    return str(cause) if isinstance(cause, Refused) else str(error)


def _run_worker(job: FillJob) -> int:
    """Fill the cache beside others; Ray shows each task its own GPU as number 0."""
    return job.run(0)
