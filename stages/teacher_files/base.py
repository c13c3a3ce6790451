"""What `--teacher` names, before anything is changed: a diffusers folder, or one file with the configs for it."""

from functools import partial
from pathlib import Path

from stages.system.refusal import Refused
from stages.teacher_files.architecture import check_component_match, check_sd1_architecture
from stages.teacher_files.assembly import Assembly
from stages.teacher_files.checkpoint.kinds import Contents, contents_of
from stages.teacher_files.checkpoint.layout import CONFIG_REMEDY, component_tensors
from stages.teacher_files.folder import COMPONENT_NAMES, MODEL_INDEX, read_json, weight_variants
from stages.teacher_files.hub import (
    SINGLE_FILE_SUFFIXES,
    HubId,
    HubRepository,
    resolve_configs,
    single_file_candidates,
)
from stages.teacher_files.parts import Part, folder_part, open_tensor_source, single_file_digest
from stages.teacher_files.schedule import read_buffers
from stages.teacher_files.source import TeacherSource

DEFAULT_CONFIGS = "stable-diffusion-v1-5/stable-diffusion-v1-5"
"""Whose configs a single file is taken to have."""
FILE_REMEDY = "fetch the file again"
PART_WORDS = {"unet": "UNet", "vae": "autoencoder", "text_encoder": "text encoder"}


def open_base(source: TeacherSource, config_option: str) -> Assembly:
    """The parts of what `--teacher` names; raises `Refused` where it is no SD-1.x model."""
    place = locate(source.location)
    if place.is_dir():
        return _folder_assembly(source, place)
    return _file_assembly(source, place, config_option)


def open_beside(location: str, base: Assembly, word: str, remedy: str) -> Assembly:
    """The parts of a model of the same kind as `base`, whose configs and parts serve where a single file has none.

    Messages begin with `word`; `remedy` is what to do with a file that does not fit the base. Raises `Refused` as
    `open_base` does.
    """
    place, source = locate(location, word), TeacherSource(location=location)
    if not place.is_dir():
        return _file_assembly(source, place, remedy, word, base)
    made = _folder_assembly(source, place, word)
    check_sd1_architecture(place)
    check_component_match(place)
    return made


def locate(location: str, option: str = "teacher") -> Path:
    """The diffusers folder or the single file that a location means, fetched from a hub if it lies there.

    `option` is what the location was given to, for messages.
    """
    place = Path(location)
    if place.is_dir():
        return _folder_or_its_file(place)
    if place.exists() or place.is_symlink():
        return place
    hub_id = HubId.parse(location)
    if place.suffix.lower() in SINGLE_FILE_SUFFIXES and not (hub_id and hub_id.file and location.count("/") > 1):
        raise Refused(f"{option}: {location}: there is no such file - name a file, a folder or a hub id")
    repository = HubRepository.open(location, option)
    if MODEL_INDEX in repository.names and repository.hub_id.file is None:
        return repository.fetch_parts(COMPONENT_NAMES)
    return repository.fetch_file()


def lies_here(location: str) -> bool:
    """Whether a location is a file, a diffusers folder, or a folder with one checkpoint, on this machine."""
    place = Path(location)
    if place.is_dir():
        return (place / MODEL_INDEX).is_file() or len(_checkpoints_in(place)) == 1
    return place.is_file()


def _checkpoints_in(folder: Path) -> list[str]:
    return single_file_candidates([file.name for file in folder.iterdir() if file.is_file()])


def _folder_or_its_file(folder: Path) -> Path:
    """The folder, or the one checkpoint that lies in a folder which is no diffusers model."""
    if (folder / MODEL_INDEX).exists():
        return folder
    candidates = _checkpoints_in(folder)
    if len(candidates) > 1:
        names = ", ".join(candidates[:5])
        raise Refused(
            f"teacher: {folder}: no diffusers model lies here ({MODEL_INDEX} is missing); there are {names} - "
            "name one of them"
        )
    return folder / candidates[0] if candidates else folder


def _folder_assembly(source: TeacherSource, folder: Path, word: str = "teacher") -> Assembly:
    index = read_json(folder / MODEL_INDEX)
    for name, given in (("config", source.config), ("parts_from", source.parts_from), ("averaged", source.averaged)):
        if given:
            option = f"--teacher.{name.replace('_', '-')}"
            raise Refused(f"{option}: {given}: is for a single file, and {source.location} is a folder - leave it out")
    notes = []
    if variants := {part: variant for part, variant in weight_variants(folder).items() if variant}:
        taken = ", ".join(f"{variant} of {part}" for part, variant in variants.items())
        notes.append(f"{word}: {source.location}: plain weights are missing, taken is {taken}")
    stated: dict[str, str | bool] = {}
    if (scheduler := folder / "scheduler" / "scheduler_config.json").is_file():
        config = read_json(scheduler)
        keys = {"prediction_type": "prediction_type", "rescale_betas_zero_snr": "zero_terminal_snr"}
        stated = {name: config[key] for key, name in keys.items() if config.get(key) is not None}
    plain = (file for file in folder.iterdir() if file.is_file())  # no link that leads nowhere, no folder, no pipe
    cards = tuple(sorted(file for file in plain if file.name == "README.md" or file.name[:7] == "LICENSE"))
    return Assembly(partial(folder_part, folder), folder, index, folder, cards, notes=notes, stated=stated)


def _file_assembly(
    source: TeacherSource, file: Path, way_out: str, word: str = "teacher", lender: Assembly | None = None
) -> Assembly:
    """The parts of a single file; `lender` has the configs and the parts that it lacks, where no option names them.

    `way_out` is the option that names its configs, or with a lender the remedy of a file that does not fit them.
    """
    subject = f"{word}: {file}"
    opened = open_tensor_source(file, subject, FILE_REMEDY)
    contents = contents_of(opened, subject)
    averaged = _takes_averaged(source, contents, subject)
    others = None
    if lender is None:
        lacking = [part for part in PART_WORDS if part != "unet" and part not in contents.groups]
        needed = [part for part in lacking if part != "vae" or source.vae is None]
        others = _other_parts_file(source, needed, subject)
    configs = lender.configs if lender else _configs(source, others, way_out)
    remedy = way_out if lender else CONFIG_REMEDY

    def load(component: str) -> Part:
        if component == "unet" or component in contents.groups:
            takes = averaged and component == "unet"
            return file_part(contents, component, configs, file, subject, averaged=takes, remedy=remedy)
        if lender is not None:
            return lender.part(component)
        if component in PART_WORDS and others is not None:
            return _part_from(others, component, configs)
        return folder_part(configs, component)

    made = Assembly(load, configs, read_json(configs / MODEL_INDEX), stated=dict(contents.stated))
    made.add_source("model", file)
    made.notes += _file_notes(source, contents, opened.foreign, word, averaged=averaged)
    if others is not None and others.is_file():
        made.add_source("parts", others)
    table_remedy = way_out if lender else f"name with {way_out} a folder whose scheduler_config.json has it"
    read_buffers(contents, made, subject, table_remedy)
    return made


def _takes_averaged(source: TeacherSource, contents: Contents, subject: str) -> bool:
    """Whether the UNet's averaged weights are taken; raises `Refused` for a file without a UNet."""
    has_plain, has_averaged = "unet" in contents.groups, "averaged" in contents.groups
    if not has_plain and not has_averaged:
        held = " and ".join(PART_WORDS[part] for part in PART_WORDS if part in contents.groups)
        option = "vae" if "vae" in contents.groups else "parts-from"
        raise Refused(
            f"{subject}: is an SD-1.x model's {held} alone, without a UNet - name a model with --teacher, and this "
            f"file with --teacher.{option}"
        )
    if source.averaged and not has_averaged:
        raise Refused(f"{subject}: holds no averaged weights (model_ema) - leave --teacher.averaged out")
    return has_averaged and (source.averaged or not has_plain)


def _file_notes(
    source: TeacherSource, contents: Contents, foreign: tuple[str, ...], word: str, *, averaged: bool
) -> list[str]:
    notes, subject = [], f"{word}: {source.location}"
    if foreign:
        names = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        notes.append(f"{subject}: holds foreign objects ({names}), which were not read; no code was run")
    if averaged and not source.averaged:
        notes.append(f"{subject}: holds averaged weights (model_ema) alone, which are taken")
    elif "averaged" in contents.groups and not averaged:
        other = " (--teacher.averaged true takes the averaged)" if word == "teacher" else ""
        notes.append(
            f"{subject}: holds averaged weights (model_ema) too; the plain ones are taken, as other programs do{other}"
        )
    return notes


def _other_parts_file(source: TeacherSource, needed: list[str], subject: str) -> Path | None:
    """The folder or file of `--teacher.parts-from`; raises `Refused` where it lacks and where it is not needed."""
    if source.parts_from is None:
        if needed:
            words = " and ".join(PART_WORDS[part] for part in needed)
            raise Refused(
                f"{subject}: holds no {words} - name with --teacher.parts-from a folder, hub id or file that has them"
            )
        return None
    if not needed:
        raise Refused(f"--teacher.parts-from: {source.parts_from}: is not needed, all parts are there - leave it out")
    return locate(source.parts_from, "--teacher.parts-from")


def _configs(source: TeacherSource, others: Path | None, config_option: str) -> Path:
    """The diffusers folder with the configs of a single file."""
    named = source.config or (str(others) if others is not None and others.is_dir() else None)
    try:
        configs = resolve_configs(named or DEFAULT_CONFIGS, config_option)
        if not (configs / MODEL_INDEX).is_file():
            raise Refused(f"{config_option}: {configs}: is no diffusers folder ({MODEL_INDEX} is missing) - name one")
    except Refused as refusal:
        if named:
            raise
        raise Refused(
            f"teacher: {source.location}: a single file has no configs, and those of {DEFAULT_CONFIGS} cannot be "
            f"fetched - name a diffusers folder of the same kind of model with {config_option} FOLDER"
        ) from refusal
    check_sd1_architecture(configs)
    check_component_match(configs)
    return configs


def file_part(
    contents: Contents,
    component: str,
    configs: Path,
    file: Path,
    subject: str,
    *,
    averaged: bool = False,
    remedy: str = CONFIG_REMEDY,
) -> Part:
    """A component of a single file, with its config from a folder."""
    config = configs / component / "config.json"
    digest = single_file_digest(file, config, "averaged" if averaged else "plain")
    tensors = component_tensors(contents, component, configs, subject, averaged=averaged, remedy=remedy)
    return Part(component, (config,), digest, tensors)


def _part_from(place: Path, component: str, configs: Path) -> Part:
    """A component of the folder or file of `--teacher.parts-from`."""
    if place.is_dir():
        return folder_part(place, component)
    subject = f"--teacher.parts-from: {place}"
    contents = contents_of(open_tensor_source(place, subject, FILE_REMEDY), subject)
    if component not in contents.groups:
        raise Refused(f"{subject}: holds no {PART_WORDS[component]} - name a folder, hub id or file that has one")
    return file_part(contents, component, configs, place, subject)
