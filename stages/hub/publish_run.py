"""`sollune publish RUN --to ORG/NAME`: send a run's export and newest checkpoint to the hub."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from pydantic import Field

from configs.load import config_from_arguments, name_first_argument
from configs.values import Strict
from stages.hub.repository import Repository, root_cause
from stages.hub.snapshot import CHECKPOINTS_FOLDER, Snapshot, Staging
from stages.system.refusal import Refused
from stages.train.checkpoint_store import fault_of

USAGE = "usage: sollune publish RUN --to ORG/NAME [--private true|false] [--checkpoint true|false]"


class Config(Strict):
    """Send a run's export, and its newest checkpoint, to a hub repository: `sollune publish RUN --to ORG/NAME`."""

    run: Path = Field(description="run folder, such as runs/tiny/distill")
    to: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="hub repository, ORG/NAME; made if it is missing")
    private: bool = Field(True, description="make the repository private, and refuse one that is public already")
    checkpoint: bool = Field(True, description="send the newest whole checkpoint too, from which a run can resume")


def run(config: Config, repository: Repository | None = None) -> None:
    """Upload what is there and compare the hashes on the hub; files that are there already are not sent again.

    Raises `Refused` when there is nothing to send, no permission, or when it did not arrive.
    """
    repository = repository or Repository(config.to, config.private)
    with closing(Staging(config.run)) as staging:
        snapshots = list(_snapshots(config, staging))
        if not snapshots:
            raise Refused(f"{config.run}: holds neither an export nor a whole checkpoint - name a run that does")
        for snapshot in snapshots:
            try:
                repository.upload(snapshot)
            except Refused:
                raise
            except Exception as error:  # the client and its transports raise many kinds
                raise Refused(
                    f"hub {config.to}: {snapshot.name} has not arrived ({root_cause(error)}) - "
                    "run the same command again, it goes on from there"
                ) from error
            print(f"hub {config.to}: {snapshot.name} is there, {len(snapshot.files())} files with the right hash")


def _snapshots(config: Config, staging: Staging) -> Iterator[Snapshot]:
    try:
        if config.checkpoint:
            for folder in sorted((config.run / CHECKPOINTS_FOLDER).glob("[0-9]*"), reverse=True):
                if fault := fault_of(folder):
                    print(f"{folder}: passed over, {fault}")
                    continue
                yield staging.snapshot_checkpoint(folder)
                break
        if (config.run / "export").is_dir():
            yield staging.snapshot_export(config.run / "export")
    except OSError as error:
        raise Refused(f"{config.run}: cannot be read ({root_cause(error)}) - run the same command again") from error


def main(argv: Sequence[str]) -> int:
    """`sollune publish RUN --to ORG/NAME`."""
    argv = name_first_argument(argv, "run", f"publish: which run? - {USAGE}")
    config = config_from_arguments(Config, "publish", argv)
    if config is not None:
        run(config)
    return 0
