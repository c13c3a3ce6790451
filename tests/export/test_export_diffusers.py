import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel, UniPCMultistepScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from stages.export import main
from stages.export.diffusers import export_diffusers
from stages.export.verify_export import ExportOptions
from stages.flow.schedule import NoiseSchedule
from stages.flow.solver import apply_guidance, euler
from stages.nets.run_folder import Origin
from stages.nets.scheduler import flow_scheduler
from stages.nets.student import TIME_SCALE, Student, make_vp_bridge
from stages.system.refusal import Refused
from stages.teacher_files.folder import component_digests, read_json

TEXTS = ["a small red star at the left", "a large blue ring"]


def open_stock(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: StableDiffusionPipeline, steps: int) -> torch.Tensor:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    return pipeline(TEXTS, num_inference_steps=steps, guidance_scale=3.0, latents=noise, output_type="latent").images


def own_euler(pipeline: StableDiffusionPipeline, steps: int, whole_times: bool) -> torch.Tensor:
    """Our solver on the grid of the stock scheduler."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    cond, uncond = pipeline.encode_prompt(TEXTS, torch.device("cpu"), 1, True)
    student = Student(pipeline.unet)

    def velocity(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        time = (TIME_SCALE * s).floor() / TIME_SCALE if whole_times else s
        out = student(x, time, cond, uncond[:1])
        return apply_guidance(out.v_cond, out.v_uncond, 3.0)

    scheduler = flow_scheduler()
    scheduler.set_timesteps(steps)
    with torch.inference_mode():
        return euler(velocity, x, scheduler.sigmas)


def test_the_scheduler_loads_as_unipc_on_flow_sigmas(exported: Path) -> None:
    config = (scheduler := open_stock(exported).scheduler).config
    assert isinstance(scheduler, UniPCMultistepScheduler)
    assert config.prediction_type == "flow_prediction"
    assert config.use_flow_sigmas
    assert config.solver_order == 1
    assert config.flow_shift == 1.0
    assert config.final_sigmas_type == "zero"
    assert config.steps_offset == 1


def test_stock_pipeline_in_order_one_is_our_euler(exported: Path) -> None:
    """With the corrector off. The stock pipeline truncates 1000 s to a whole number, so ours gets the same."""
    pipeline = open_stock(exported)
    pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config, disable_corrector=[*range(8)])
    stock = sample(pipeline, 8)
    assert torch.allclose(stock, own_euler(pipeline, 8, whole_times=True), atol=2e-4)
    exact = own_euler(pipeline, 8, whole_times=False)
    assert (stock - exact).norm() < 5e-3 * exact.norm()


def test_stock_pipeline_approaches_our_euler_with_the_shipped_scheduler(exported: Path) -> None:
    pipeline = open_stock(exported)
    exact = own_euler(pipeline, 80, whole_times=True)
    near, far = ((sample(pipeline, n) - exact).norm() / exact.norm() for n in (16, 4))
    assert near < 0.02
    assert near < far


def test_unet_is_the_students_and_its_config_the_teachers(
    exported: Path, student: Student, teacher_folder: Path
) -> None:
    written = load_file(exported / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in student.unet.state_dict().items())
    own, teachers = (
        UNet2DConditionModel.load_config(folder, subfolder="unet") for folder in (exported, teacher_folder)
    )
    assert {**own, "_name_or_path": ""} == {**teachers, "_name_or_path": ""}


def test_no_file_names_the_folder_where_it_was_made(exported: Path, teacher_folder: Path) -> None:
    for file in exported.rglob("*.json"):
        assert str(teacher_folder) not in file.read_text()


def test_half_precision_is_the_default(folder: Path) -> None:
    for part in ("unet", "vae", "text_encoder"):
        for file in (folder / part).glob("*.safetensors"):
            assert {value.dtype for value in load_file(file).values()} == {torch.float16}


def test_both_types_are_in_one_folder_and_load_by_variant(
    student: Student, teacher_folder: Path, tmp_path: Path
) -> None:
    run = save_run(tmp_path / "distill", teacher_folder, student)
    assert main([str(run), "--dtype", "both"]) == 0
    folder = run / "export" / "diffusers"
    types = {
        f"{file.parent.name}/{file.name}": {value.dtype for value in load_file(file).values()}
        for file in folder.rglob("*.safetensors")
    }
    assert types == {
        "unet/diffusion_pytorch_model.safetensors": {torch.float32},
        "unet/diffusion_pytorch_model.fp16.safetensors": {torch.float16},
        "vae/diffusion_pytorch_model.safetensors": {torch.float32},
        "vae/diffusion_pytorch_model.fp16.safetensors": {torch.float16},
        "text_encoder/model.safetensors": {torch.float32},
        "text_encoder/model.fp16.safetensors": {torch.float16},
    }
    plain = open_stock(folder).unet.state_dict()
    half = StableDiffusionPipeline.from_pretrained(folder, variant="fp16", dtype=torch.float16).unet.state_dict()
    assert all(torch.equal(plain[name], value) for name, value in student.unet.state_dict().items())
    assert all(torch.equal(half[name], value.half()) for name, value in plain.items())
    (single,) = (run / "export").glob("*-flow.safetensors")
    assert {value.dtype for value in load_file(single).values()} == {torch.float16}


def test_text_encoder_keys_are_nested(exported: Path) -> None:
    with safe_open(exported / "text_encoder" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(name.startswith("text_model.") and ".text_model." not in name for name in file.keys())  # noqa: SIM118


def test_tokenizer_can_be_read_by_every_transformers(exported: Path) -> None:
    assert (exported / "tokenizer" / "vocab.json").is_file()
    assert (exported / "tokenizer" / "merges.txt").is_file()
    tokenizer = CLIPTokenizer.from_pretrained(exported / "tokenizer")
    assert tokenizer("a red star").input_ids[1:-1] == [tokenizer.vocab[f"{w}</w>"] for w in ("a", "red", "star")]


def test_facts_and_card_state_what_it_is(exported: Path) -> None:
    facts = json.loads((exported / "sollune.json").read_text())
    assert (facts["samples"], facts["tail"], facts["prediction"], facts["time_scale"]) == (
        64,
        "hold",
        "velocity",
        1000.0,
    )
    assert len(facts["teacher_sha256"]["unet"]) == 64
    _, head, body = (exported / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "diffusers"
    assert "samples: `64`" in body
    index = json.loads((exported / "model_index.json").read_text())
    assert index["safety_checker"] == [None, None]


def test_a_scheduler_for_noise_prediction_refuses_it_loudly(exported: Path) -> None:
    pipeline = open_stock(exported)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="flow_prediction"):
        sample(pipeline, 2)


def test_the_teachers_own_weights_are_refused(teacher_folder: Path, tmp_path: Path) -> None:
    teacher = Student.from_teacher(UNet2DConditionModel.from_pretrained(teacher_folder, subfolder="unet"))
    with pytest.raises(Refused, match="still the teacher's"):
        export_diffusers(teacher, teacher_folder, tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_one_tensor_of_the_teacher_is_refused_by_name(student: Student, teacher_folder: Path, tmp_path: Path) -> None:
    teacher = UNet2DConditionModel.from_pretrained(teacher_folder, subfolder="unet")
    student.unet.conv_out.load_state_dict(teacher.conv_out.state_dict())
    with pytest.raises(Refused, match=r"2 of \d+ tensors .*conv_out"):
        export_diffusers(student, teacher_folder, tmp_path, {})


@pytest.mark.parametrize(("value", "remedy"), [(1e5, "--dtype float32"), (float("nan"), "another checkpoint")])
def test_values_that_do_not_fit_half_precision_are_refused(
    value: float, remedy: str, student: Student, teacher_folder: Path, tmp_path: Path
) -> None:
    with torch.no_grad():
        student.unet.conv_in.bias[0] = value
    with pytest.raises(Refused, match=rf"conv_in\.bias .*{remedy}"):
        export_diffusers(student, teacher_folder, tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_export_stays_until_the_new_one_is_whole(
    student: Student, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = export_diffusers(student, teacher_folder, tmp_path, {"samples": 64}, ExportOptions(dtype="float32"))
    before = (exported / "sollune.json").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("stages.export.diffusers._keep_tokenizer", full)
        with pytest.raises(Refused, match="No space left on device"):
            export_diffusers(student, teacher_folder, tmp_path, {"samples": 128}, ExportOptions(dtype="float32"))
    assert (exported / "sollune.json").read_bytes() == before
    assert list(tmp_path.iterdir()) == [exported]
    export_diffusers(student, teacher_folder, tmp_path, {"samples": 128}, ExportOptions(dtype="float32"))
    assert json.loads((exported / "sollune.json").read_text())["samples"] == 128
    assert list(tmp_path.iterdir()) == [exported]


def test_a_folder_that_is_no_export_is_never_replaced(student: Student, teacher_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "diffusers").mkdir()
    (tmp_path / "diffusers" / "mine.txt").write_text("keep me")
    with pytest.raises(Refused, match="no export of ours"):
        export_diffusers(student, teacher_folder, tmp_path, {})
    assert (tmp_path / "diffusers" / "mine.txt").read_text() == "keep me"


def save_run(folder: Path, teacher_folder: Path, student: Student) -> Path:
    (folder / "checkpoints" / "64").mkdir(parents=True)
    save_file(student.unet.state_dict(), folder / "checkpoints" / "64" / "ema.safetensors")
    Origin(str(teacher_folder), component_digests(teacher_folder), "hold", "0" * 64).save(folder)
    return folder


def test_export_command_writes_the_newest_checkpoint(
    student: Student, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "distill", teacher_folder, student)
    assert main([str(run), "--dtype", "float32", "--single-file", "false"]) == 0
    assert str(run / "export" / "diffusers") in capsys.readouterr().out
    assert [path.name for path in (run / "export").iterdir()] == ["diffusers"]
    written = load_file(run / "export" / "diffusers" / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(written["conv_in.weight"], student.unet.conv_in.weight)


@pytest.mark.parametrize(
    ("words", "message"),
    [((), "which run"), (("nowhere",), "no run lies here"), (("RUN", "--checkpoint", "65"), "there are 64")],
)
def test_export_command_refuses_in_one_line(
    words: tuple[str, ...], message: str, student: Student, teacher_folder: Path, tmp_path: Path
) -> None:
    run = save_run(tmp_path / "distill", teacher_folder, student)
    with pytest.raises(Refused, match=message) as refusal:
        main([str(run) if word == "RUN" else word for word in words])
    assert "\n" not in str(refusal.value)


def test_a_student_of_v_prediction_goes_out_with_ddim_on_its_teachers_betas(
    student: Student, teacher_folder: Path, tmp_path: Path
) -> None:
    schedule = NoiseSchedule.from_config(read_json(teacher_folder / "scheduler" / "scheduler_config.json"))
    v_student = Student(student.unet, make_vp_bridge("vp_v", schedule, "faithful"))
    folder = export_diffusers(v_student, teacher_folder, tmp_path, {"samples": 64}, ExportOptions(dtype="float32"))
    pipeline = open_stock(folder)
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod.double(), schedule.alpha_bar, atol=1e-5, rtol=1e-5)
    assert json.loads((folder / "sollune.json").read_text())["prediction"] == "v_prediction"
    assert "v-prediction" in (folder / "README.md").read_text()

    # One step of stock DDIM is one Euler step of the student's own field between the same two times.
    cond, uncond = pipeline.encode_prompt(TEXTS, torch.device("cpu"), 1, True)
    pipeline.scheduler.set_timesteps(20)
    k, k_next = (pipeline.scheduler.timesteps[i].repeat(2) for i in (4, 5))
    assert v_student.vp_bridge is not None
    s, s_next = (v_student.vp_bridge.s_of_k(one) for one in (k, k_next))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        stepped = x + (s_next - s).float().view(-1, 1, 1, 1) * v_student(x, s, cond, uncond[:1]).v_cond
        shown = v_student.vp_bridge.teacher_input(x, s)
        output = pipeline.unet(shown, k, cond).sample
    stock = pipeline.scheduler.step(output, int(k[0]), shown).prev_sample
    torch.testing.assert_close(stock, v_student.vp_bridge.teacher_input(stepped, s_next), atol=1e-4, rtol=1e-4)
