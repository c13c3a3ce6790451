"""Laws of the student: the input of its network, and the meaning of its output."""

from dataclasses import replace

import pytest
import torch

from stages.nets.components import Components, load_components
from stages.nets.student import Student, make_vp_bridge
from stages.nets.teacher import Teacher


@pytest.fixture(scope="module")
def parts() -> Components:
    return load_components("stages/tiny/model", torch.device("cpu"), torch.float32)


X = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
K = torch.tensor([30, 500, 999])


def test_a_student_of_v_prediction_is_the_field_of_a_v_predicting_teacher(parts: Components) -> None:
    v_predicting = replace(parts, schedule=replace(parts.schedule, prediction_type="v_prediction"))
    teacher = Teacher(v_predicting, "hold")
    student = Student.from_teacher(parts.unet, make_vp_bridge("vp_v", parts.schedule, "hold"))
    cond, s = teacher.encode_texts(["a red star", "a blue moon", "a heart"]), teacher.bridge.s_of_k(K).float()
    with torch.no_grad():
        output = student(X, s, cond, teacher.uncond)
    expected = teacher.predict(X, s, K, cond, teacher.uncond)
    torch.testing.assert_close(output.v_cond, expected.v_cond, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(output.v_uncond, expected.v_uncond, atol=2e-4, rtol=2e-4)


def test_a_student_of_the_velocity_takes_the_state_and_a_thousand_s(parts: Components) -> None:
    student, inputs_of_calls = Student.from_teacher(parts.unet), []
    student.unet.register_forward_pre_hook(lambda _unet, inputs: inputs_of_calls.append(inputs))
    s = torch.tensor([0.1234, 0.5, 1.0])
    with torch.no_grad():
        student.velocity(X, s, torch.zeros(3, 2, 64))
    network_input, timestep, _cond = inputs_of_calls[0]
    assert torch.equal(network_input, X)
    assert timestep.tolist() == pytest.approx([123.4, 500.0, 1000.0])


def test_only_v_prediction_needs_a_bridge(parts: Components) -> None:
    assert make_vp_bridge("velocity", parts.schedule, "hold") is None
    spoken = make_vp_bridge("vp_v", parts.schedule, "faithful")
    assert spoken is not None
    assert (spoken.schedule.prediction_type, spoken.tail) == ("v_prediction", "faithful")


def gradients(parts: Components, **layout: bool) -> dict[str, torch.Tensor]:
    """Of a loss on velocities and features alike."""
    student = Student.from_teacher(parts.unet).train()
    student.configure_compute(**layout)
    output = student(X, torch.tensor([0.1, 0.5, 0.9]), torch.ones(3, 2, 64), torch.zeros(1, 2, 64))
    loss = (
        output.v_cond.square().mean()
        + output.v_uncond.mean()
        + sum(f.square().mean() for f in output.features.values())
    )
    loss.backward()
    assert not student.feature_tap.pop_features(slice(None))
    return {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("knob", ["gradient_checkpointing", "channels_last"])
def test_how_the_student_computes_changes_no_gradient(parts: Components, knob: str) -> None:
    plain, other = gradients(parts), gradients(parts, **{knob: True})
    assert plain.keys() == other.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(other[name], gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, as its compiler is imported
def test_how_the_student_computes_changes_no_name(parts: Components) -> None:
    plain, other = Student.from_teacher(parts.unet), Student.from_teacher(parts.unet)
    other.configure_compute(gradient_checkpointing=True, compile=True, channels_last=True)
    assert list(other.state_dict()) == list(plain.state_dict())
    assert list(dict(other.named_parameters())) == list(dict(plain.named_parameters()))
