"""Models on a hub: their files are listed first, and exactly those that will be read are fetched."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, errors, snapshot_download

from stages.system.refusal import Refused, in_one_line
from stages.teacher_files.folder import (
    COMPONENT_NAMES,
    LEGACY_TOKENIZER_FILES,
    MODEL_INDEX,
    TOKENIZER_FILES,
    shard_names,
)
from stages.teacher_files.variants import WEIGHT_FILES, choose_weights

SINGLE_FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
"""Of files that hold a whole model; of two with one stem the earlier ending is taken."""
HUB_ID = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@(?P<revision>[\w./-]+?))?"
    r"(?P<file>/[^@]*\.(?i:safetensors|ckpt|pt|pth|bin))?"
)
ROOT_FILES = (MODEL_INDEX, "README.md", "sollune.json")
LICENSE_PREFIX = "LICENSE"
HTTP_ERROR: Any = getattr(errors, "HTTPError", OSError)  # of whichever transport the client uses
FETCH_ERRORS: tuple[Any, ...] = (HTTP_ERROR, OSError, ValueError)
UNREACHABLE = "is neither a folder nor a hub repository that can be reached"
NAME_REMEDY = "name a diffusers folder or one file of an SD-1.x model"


@dataclass(frozen=True)
class HubId:
    """A repository, a branch, tag or commit of it, and one of its files."""

    repository: str
    revision: str | None
    file: str | None

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}" if self.revision else self.repository

    @classmethod
    def parse(cls, location: str) -> "HubId | None":
        """The meaning of owner/name, owner/name@revision or either with /FILE behind; None for any other text."""
        match = HUB_ID.fullmatch(location)
        return cls(match["repository"], match["revision"], match["file"] and match["file"][1:]) if match else None


@dataclass(frozen=True)
class HubRepository:
    """A repository that can be reached, or what was fetched of it before."""

    subject: str
    """How messages begin, with what the user named."""
    hub_id: HubId
    names: tuple[str, ...]
    offline: bool

    @classmethod
    def open(cls, location: str, option: str = "teacher") -> "HubRepository":
        """List the files; raises `Refused` where that is not possible and nothing was fetched before.

        `option` is what the location was given to.
        """
        subject = f"{option}: {location!r}"
        hub_id = HubId.parse(location)
        if hub_id is None:
            raise Refused(f"{subject} {UNREACHABLE} - {NAME_REMEDY}")
        try:
            names = HfApi().list_repo_files(hub_id.repository, revision=hub_id.revision)
            return cls(subject, hub_id, tuple(names), offline=False)
        except errors.RevisionNotFoundError as error:
            raise Refused(
                f"{subject}: the hub repository has no revision {hub_id.revision!r} - "
                "name a branch, a tag or a commit behind @"
            ) from error
        except errors.GatedRepoError as error:
            raise Refused(
                f"{subject}: the hub repository is given to those alone who accept its terms - accept "
                "them on its page and log in, or name a folder"
            ) from error
        except FETCH_ERRORS as error:
            cached = cls(subject, hub_id, (), offline=True)
            try:
                folder = cached.fetch(())
            except Refused:
                raise Refused(f"{subject} {UNREACHABLE} - {NAME_REMEDY}") from error
            names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
            return cls(subject, hub_id, tuple(names), offline=True)

    def fetch(self, names: Collection[str]) -> Path:
        """The local folder with these files; raises `Refused` where they cannot be fetched."""
        patterns = [re.sub(r"([*?[])", r"[\1]", name) for name in sorted(names)]
        options: dict[str, Any] = {"local_files_only": True} if self.offline else {"allow_patterns": patterns}
        try:
            return Path(snapshot_download(self.hub_id.repository, revision=self.hub_id.revision, **options))
        except FETCH_ERRORS as error:
            raise Refused(f"{self.subject} cannot be fetched ({in_one_line(error)}) - try again") from error

    def fetch_parts(self, parts: Sequence[str]) -> Path:
        """The folder with what is read of these parts, one variant of the weights of each."""
        names = {name for part in parts for name in self._names_of(part)}
        names |= {name for name in self.names if name in ROOT_FILES or name.startswith(LICENSE_PREFIX)}
        by_part = {part: self._names_in(part) for part in WEIGHT_FILES if part in parts}
        chosen = choose_weights(by_part)
        weights = {f"{part}/{file.name}" for part, file in chosen.items()}
        indices = sorted(name for name in weights if name.endswith(".json"))
        folder = self.fetch(names | weights)
        shards = {
            f"{Path(name).parent}/{shard}" for name in indices if (folder / name).exists()
            for shard in shard_names(folder / name)
        }  # fmt: skip
        return self.fetch(names | weights | shards) if shards else folder

    def fetch_configs(self) -> Path:
        """The folder with configs and tokenizer alone."""
        names = {name for part in COMPONENT_NAMES for name in self._names_of(part)}
        return self.fetch(names | {name for name in self.names if name == MODEL_INDEX})

    def fetch_bare_part(self, part: str) -> Path | None:
        """The folder of a repository that holds one part at its root; None where it holds none."""
        chosen = choose_weights({part: [name for name in self.names if "/" not in name]}).get(part)
        if chosen is None or "config.json" not in self.names:
            return None
        folder = self.fetch({"config.json", chosen.name})
        if chosen.name.endswith(".json"):
            return self.fetch({"config.json", chosen.name, *shard_names(folder / chosen.name)})
        return folder

    def fetch_file(self) -> Path:
        """The one file of a whole model that lies here; raises `Refused` for none and for several."""
        name = self.hub_id.file or self._single_candidate()
        if name not in self.names:
            raise Refused(f"{self.subject}: the repository has no file {name} - look at its list of files")
        return self.fetch({name}) / name

    def _single_candidate(self) -> str:
        candidates = single_file_candidates(self.names)
        if len(candidates) != 1:
            there = f"; there are {', '.join(candidates[:5])}" if candidates else ""
            way = f"name one as {self.hub_id}/FILE" if candidates else NAME_REMEDY
            raise Refused(f"{self.subject}: no diffusers model lies there{there} - {way}")
        return candidates[0]

    def _names_in(self, part: str) -> list[str]:
        return [name.partition("/")[2] for name in self.names if str(Path(name).parent) == part]

    def _names_of(self, part: str) -> set[str]:
        """The files of a part that are no weights."""
        wanted = {"tokenizer": (*TOKENIZER_FILES, *LEGACY_TOKENIZER_FILES), "scheduler": ("scheduler_config.json",)}
        return {f"{part}/{name}" for name in wanted.get(part, ("config.json",))} & set(self.names)


def single_file_candidates(names: Collection[str]) -> list[str]:
    """The files at the root of a folder that may hold a whole model, one of each stem."""
    by_stem: dict[str, str] = {}
    for suffix in SINGLE_FILE_SUFFIXES:
        for name in sorted(names):
            if "/" not in name and name.lower().endswith(suffix) and not name.startswith("."):
                by_stem.setdefault(name[: -len(suffix)], name)
    return sorted(by_stem.values())


def resolve_folder(location: str, parts: Sequence[str] = COMPONENT_NAMES) -> Path:
    """The local folder of a diffusers model: the folder itself, or these parts of a hub repository."""
    if Path(location).is_dir():
        return Path(location)
    return HubRepository.open(location).fetch_parts(parts)


def resolve_configs(location: str, option: str = "teacher") -> Path:
    """The local folder of a model's configs and tokenizer; weights are not fetched.

    Raises `Refused`, naming `option`, where there is none.
    """
    if Path(location).is_file():
        raise Refused(f"{option}: {location}: is a file, and configs lie in a folder - name a diffusers folder")
    return Path(location) if Path(location).is_dir() else HubRepository.open(location, option).fetch_configs()
