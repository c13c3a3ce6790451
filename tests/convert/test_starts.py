from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from configs.values import PictureSize
from stages.convert.delta import add_difference
from stages.convert.starts import BASE, Models, Probe, delta_obstacle, load_base_student, make_start, probe_starts
from stages.convert.stored import read_result, to_json
from stages.evaluate.paired import PairedError
from stages.flow.schedule import NoiseSchedule
from stages.nets.components import Components
from stages.nets.features import copy_without_hooks
from stages.nets.graft import graft_time_embedding
from stages.nets.student import Student, Target
from stages.nets.teacher import Teacher
from stages.sampling.sampler import Sampler
from stages.system.refusal import Refused
from stages.tiny import anatomy
from tests.convert.conftest import MakeModels, perturbed, save_run

TEXTS = ("a small red star", "a large blue ring")
SAMPLER = Sampler(guidance=3.0, steps=2)


def probe(models: Models, names: Sequence[str] = ("delta", "graft")) -> Probe:
    return probe_starts(models, TEXTS, 0, SAMPLER, names)  # type: ignore[arg-type]


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    own, others = one.state_dict(), other.state_dict()
    return own.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in own.items())


@pytest.fixture(scope="module")
def fine_tune(base: UNet2DConditionModel) -> UNet2DConditionModel:
    return perturbed(base, 0.05, seed=2)


@pytest.fixture(scope="module")
def probed(fine_tune: UNet2DConditionModel, make_models: MakeModels) -> Probe:
    return probe(make_models(fine_tune))


def test_the_delta_is_the_base_s_student_and_the_difference(
    base: UNet2DConditionModel, fine_tune: UNet2DConditionModel, grafted: Student, make_models: MakeModels
) -> None:
    expected = Student(copy_without_hooks(grafted.unet))
    add_difference(expected, base, fine_tune)
    start = make_start("delta", make_models(fine_tune))
    assert equal(start, expected)
    assert all(parameter.requires_grad for parameter in start.parameters())


def test_the_graft_is_that_of_the_fine_tune_alone(
    fine_tune: UNet2DConditionModel, make_models: MakeModels, components: Components
) -> None:
    expected = Student.from_teacher(fine_tune)
    graft_time_embedding(expected.unet, Teacher(components, "hold").bridge)
    assert equal(make_start("graft", make_models(fine_tune)), expected)


def test_no_start_changes_a_model(
    base: UNet2DConditionModel, fine_tune: UNet2DConditionModel, make_models: MakeModels
) -> None:
    before = [{name: value.clone() for name, value in one.state_dict().items()} for one in (base, fine_tune)]
    for name in ("delta", "graft"):
        make_start(name, make_models(fine_tune))
    for model, values in zip((base, fine_tune), before, strict=True):
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_a_start_has_the_config_of_the_fine_tune(base: UNet2DConditionModel, make_models: MakeModels) -> None:
    larger = UNet2DConditionModel.from_config({**base.config, "sample_size": 2 * base.config["sample_size"]})
    larger.load_state_dict(base.state_dict())
    for name in ("delta", "graft"):
        assert make_start(name, make_models(larger)).unet.config["sample_size"] == larger.config["sample_size"]


@pytest.mark.parametrize(
    ("learnt", "measured"),
    [((), "64x64"), (("64x64",), "64x64"), (("64x96", "128x128"), "128x128"), (("64x96", "96x64"), "64x96")],
)
def test_a_start_is_measured_at_a_size_that_the_base_learnt(
    base: UNet2DConditionModel, make_models: MakeModels, learnt: tuple[str, ...], measured: str
) -> None:
    """A fine-tune of 128x128; a run of before states no sizes, and learnt that of its own teacher."""
    models = make_models(UNet2DConditionModel.from_config({**base.config, "sample_size": 16}))
    origin = replace(models.base.origin, sizes=learnt)
    assert str(replace(models, base=replace(models.base, origin=origin)).size) == measured


@pytest.mark.parametrize(
    ("polished", "measured"), [(("96x64",), "96x64"), (("96x64", "128x128"), "128x128"), (("64x96", "96x64"), "64x96")]
)
def test_a_start_is_measured_at_a_size_of_the_polish(
    base: UNet2DConditionModel, make_models: MakeModels, polished: tuple[str, ...], measured: str
) -> None:
    """A fine-tune of 128x128 from a base that learnt 64x64, 128x128 and more."""
    models = make_models(UNet2DConditionModel.from_config({**base.config, "sample_size": 16}))
    origin = replace(models.base.origin, sizes=("64x64", "128x128", "96x64", "64x96"))
    sizes = tuple(map(PictureSize.parse, polished))
    assert str(replace(models, base=replace(models.base, origin=origin), polished_sizes=sizes).size) == measured


def test_the_best_start_is_that_of_the_lowest_error(probed: Probe) -> None:
    assert set(probed.errors) == {BASE, "delta", "graft"}
    assert probed.errors[probed.best].student == min(probed.errors[name].student for name in ("delta", "graft"))
    assert {error.steps for error in probed.errors.values()} == {2}
    assert 0.04 < probed.distance < 0.06
    assert probed.note == ""


def test_a_disturbed_base_makes_the_graft_the_best_and_is_measured_as_such(
    fine_tune: UNet2DConditionModel, grafted: Student, make_models: MakeModels, tmp_path: Path, probed: Probe
) -> None:
    folder = save_run(tmp_path / "distill", Student(perturbed(grafted.unet, 0.5)))
    result = probe(make_models(fine_tune, folder))
    assert result.best == "graft"
    assert result.errors["delta"].student > 1.2 * result.errors["graft"].student
    assert result.errors["graft"] == probed.errors["graft"]


def test_a_base_whose_delta_is_the_graft_measures_the_same(
    base: UNet2DConditionModel, fine_tune: UNet2DConditionModel, make_models: MakeModels, tmp_path: Path
) -> None:
    """A student that is the fine-tune's graft less the difference: the probe must see the difference come back."""
    student = make_start("graft", make_models(fine_tune))
    add_difference(student, base, fine_tune, -1.0)
    errors = probe(make_models(fine_tune, save_run(tmp_path / "distill", student))).errors
    assert errors["delta"].student == pytest.approx(errors["graft"].student, rel=1e-4)
    assert errors[BASE].student != pytest.approx(errors["graft"].student, rel=1e-3)


def test_a_fine_tune_with_the_base_s_unet_starts_as_the_base_s_student(
    base: UNet2DConditionModel, make_models: MakeModels
) -> None:
    models = make_models(copy_without_hooks(base))
    result = probe(models, ["delta"])
    assert equal(make_start("delta", models), load_base_student(models))
    assert result.distance == 0
    assert result.errors["delta"] == result.errors[BASE]
    assert "UNet of the base's teacher" in result.note


def foreign(components: Components) -> Components:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return replace(components, unet=anatomy.build_unet().eval())


def v_predicting(components: Components) -> Components:
    return replace(components, schedule=replace(components.schedule, prediction_type="v_prediction"))


def of_other_betas(components: Components) -> Components:
    return replace(components, schedule=NoiseSchedule(components.schedule.alpha_bar**1.2, "epsilon"))


def of_fewer_steps(components: Components) -> Components:
    return replace(components, schedule=NoiseSchedule(components.schedule.alpha_bar[:500], "epsilon"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (foreign, "1.41 from the base's teacher"),
        (v_predicting, "predicts v_prediction, the base's teacher epsilon"),
        (of_other_betas, "schedule"),
        (of_fewer_steps, "schedule"),
    ],
)
def test_a_fine_tune_of_another_kind_goes_by_its_graft(
    components: Components, make_models: MakeModels, change: object, named: str
) -> None:
    other = change(components)  # type: ignore[operator]
    models = make_models(other.unet, schedule=other.schedule)
    result = probe(models)
    assert result.best == "graft"
    assert set(result.errors) == {BASE, "graft"}
    assert named in result.note
    assert "\n" not in result.note
    with pytest.raises(Refused, match=f"--start delta: .*{named}"):
        probe(models, ["delta"])


def test_rounded_betas_are_the_same_schedule(components: Components, make_models: MakeModels) -> None:
    schedule = NoiseSchedule(components.schedule.alpha_bar ** (1 + 1e-7), "epsilon")
    assert delta_obstacle(make_models(components.unet, schedule=schedule), 0.0) == ""


def test_two_models_of_v_prediction_have_a_difference(make_models: MakeModels, components: Components) -> None:
    models = make_models(components.unet, schedule=v_predicting(components).schedule)
    assert delta_obstacle(replace(models, base_teacher=v_predicting(components)), 0.0) == ""


@pytest.mark.parametrize("distance", [1.0, 1.41, float("inf"), float("nan")])
def test_a_distance_that_is_no_small_number_is_an_obstacle(
    base: UNet2DConditionModel, make_models: MakeModels, distance: float
) -> None:
    assert delta_obstacle(make_models(base), distance)
    assert not delta_obstacle(make_models(base), 0.5)


def test_a_base_that_predicts_no_velocity_is_refused(
    fine_tune: UNet2DConditionModel, grafted: Student, make_models: MakeModels, tmp_path: Path
) -> None:
    target: Target = "vp_v"
    models = make_models(fine_tune, save_run(tmp_path / "distill", grafted, target))
    for call in (lambda: make_start("delta", models), lambda: probe(models)):
        with pytest.raises(Refused, match="predicts vp_v, not a velocity"):
            call()


def test_a_fine_tune_of_another_anatomy_is_refused(base: UNet2DConditionModel, make_models: MakeModels) -> None:
    other = UNet2DConditionModel.from_config({**base.config, "layers_per_block": 2})
    with pytest.raises(Refused, match="tensors that one of two has alone"):
        probe(make_models(other))


def test_starts_without_finite_latents_are_refused(base: UNet2DConditionModel, make_models: MakeModels) -> None:
    huge = copy_without_hooks(base)
    with torch.no_grad():
        huge.conv_out.weight *= 1e38
    with pytest.raises(Refused, match="no finite latents in 2 steps"):
        probe(make_models(huge))


def test_a_probe_is_stored_and_read_again(probed: Probe, tmp_path: Path) -> None:
    path = tmp_path / "start.json"
    path.write_text(to_json(probed))
    assert read_result(Probe, path) == probed


def test_numbers_that_are_not_finite_are_null_in_the_file(probed: Probe, tmp_path: Path) -> None:
    path, nan = tmp_path / "start.json", float("nan")
    broken = PairedError(3, nan, 0.1, 0.5, nan, (nan, nan))
    path.write_text(to_json(replace(probed, errors={**probed.errors, "delta": broken})))
    assert "NaN" not in path.read_text()
    read = read_result(Probe, path).errors["delta"]
    assert read.student != read.student
    assert (read.floor, read.ceiling, read.score) == (0.1, 0.5, None)


@pytest.mark.parametrize("text", ["", "{}", "[1, 2]", "\x00", '{"distance": 1, "note": "", "errors": {}, "best": "b"}'])
def test_a_broken_file_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "start.json"
    path.write_text(text)
    with pytest.raises(Refused, match=r"start\.json: cannot be read .* - delete it"):
        read_result(Probe, path)
