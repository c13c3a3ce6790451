"""Laws of the published back-end, on randomly filled checkpoints of the published shape."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stages.david.published import HOOK_POINT, PublishedAssessor, TensorHeader, infer_block_sizes, meta_block_model
from stages.david.published_heads import BlockSizes, HeadSizes
from stages.nets.features import HOOK_POINT as OURS
from stages.system.refusal import Refused

T, P = 6, 3
WIDTHS = {"down_0": 10, "mid": 14}
EXPERTS = {"down_0": 2, "mid": 3}
D = {"down_0": 7, "mid": 8}
BELLY = {"down_0": None, "mid": 16}


def head_shapes(d: int, classes: int, experts: int) -> dict[str, tuple[int, ...]]:
    """The table of david.md 2.1, by hand."""
    b = 2 * classes + 4 - (2 * classes) % 4
    c = experts * b
    shapes = {"temperature": (1,), "sparsity_threshold": (), "head_weights": (experts,), "class_bias": (classes,)}
    for e in range(experts):
        shapes |= {f"experts.{e}.0.weight": (b, d)}
        shapes |= {f"experts.{e}.{name}": (b,) for name in ("0.bias", "1.weight", "1.bias")}
        shapes |= {f"gate_heads.{e}.0.weight": (c // 2, c), f"gate_heads.{e}.0.bias": (c // 2,)}
        shapes |= {f"gate_heads.{e}.3.weight": (classes, c // 2), f"gate_heads.{e}.3.bias": (classes,)}
    shapes |= {"cross_attention.in_proj_weight": (3 * b, b), "cross_attention.in_proj_bias": (3 * b,)}
    shapes |= {"cross_attention.out_proj.weight": (b, b), "cross_attention.out_proj.bias": (b,)}
    shapes |= {"final_projection.0.weight": (classes, c)}
    return shapes | {f"final_projection.{name}": (classes,) for name in ("0.bias", "1.weight", "1.bias")}


def block_shapes(block: str, linear: bool) -> dict[str, tuple[int, ...]]:
    n, d, h = WIDTHS[block], D[block], BELLY[block]
    shapes = {"crystal_pentachora": (T, P, 5, d), "role_weights": (5,)}
    shapes |= {"cantor_stairs.alpha": (), "cantor_stairs.centers": (3,)}
    shapes |= {"cantor_stairs.feature_to_position.weight": (1, d), "cantor_stairs.feature_to_position.bias": (1,)}
    shapes |= (
        {"projection.0.weight": (h, n), "projection.0.bias": (h,), "projection.3.weight": (d, h)}
        if h
        else {"projection.weight": (d, n)}
    )
    for head, classes in (("timestep_head", T), ("pattern_head", T * P)):
        inner = {"weight": (classes, d), "bias": (classes,)} if linear else head_shapes(d, classes, EXPERTS[block])
        shapes |= {f"{head}.{name}": shape for name, shape in inner.items()}
    return shapes


def tensors(linear: bool = False) -> dict[str, torch.Tensor]:
    """Random numbers of the size that training leaves; temperatures are about a half, and may be negative."""
    generator = torch.Generator().manual_seed(0)
    content = {}
    for block in WIDTHS:
        for name, shape in block_shapes(block, linear).items():
            drawn = torch.randn(shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) == 2 else 1)
            content[f"companions.{block}.{name}"] = 0.1 * drawn - 0.5 if name.endswith("temperature") else drawn
    return content


CONFIG = {
    "num_timestep_bins": T,
    "num_patterns_per_bin": P,
    "block_configs": {block: {"input_dim": WIDTHS[block], "scale_dim": D[block]} for block in WIDTHS},
}


def written(folder: Path, content: dict[str, torch.Tensor], config=CONFIG) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in content.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def opened(folder: Path, **options) -> PublishedAssessor:
    return PublishedAssessor.open(folder, HOOK_POINT, WIDTHS, 1000, **options)


def refusal(folder: Path, content: dict[str, torch.Tensor], config=CONFIG) -> str:
    with pytest.raises(Refused) as refused:
        opened(written(folder, content, config))
    return str(refused.value)


def norm(x, weight, bias):
    """Layer normalisation over the last axis."""
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def logits_by_the_formula(w: dict[str, torch.Tensor], z: torch.Tensor) -> torch.Tensor:
    """A projective head in float64, sample by sample and head by head, from david.md 1.3 without its sparsity."""
    experts = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("experts"))

    def expert(e):
        return gelu(
            norm(
                w[f"experts.{e}.0.weight"] @ z + w[f"experts.{e}.0.bias"],
                *(w[f"experts.{e}.1.{p}"] for p in ("weight", "bias")),
            )
        )

    tokens = torch.stack([expert(e) for e in range(experts)])
    b = tokens.shape[1]
    q, k, v = (tokens @ w["cross_attention.in_proj_weight"].T + w["cross_attention.in_proj_bias"]).split(b, dim=1)
    mixed = []
    for rows in torch.arange(b).split(b // 4):
        scores = q[:, rows] @ k[:, rows].T / math.sqrt(b // 4)
        mixed.append(scores.exp() / scores.exp().sum(1, keepdim=True) @ v[:, rows])
    joined = (
        torch.cat(mixed, 1) @ w["cross_attention.out_proj.weight"].T + w["cross_attention.out_proj.bias"]
    ).flatten()
    shares = w["head_weights"].exp() / w["head_weights"].exp().sum()
    gated = w["class_bias"].clone()
    for g, share in enumerate(shares):
        hidden = gelu(w[f"gate_heads.{g}.0.weight"] @ joined + w[f"gate_heads.{g}.0.bias"])
        gated += share * (w[f"gate_heads.{g}.3.weight"] @ hidden + w[f"gate_heads.{g}.3.bias"])
    direct = w["final_projection.0.weight"] @ joined + w["final_projection.0.bias"]
    direct = norm(direct, w["final_projection.1.weight"], w["final_projection.1.bias"])
    return 0.7 * gated / w["temperature"].abs() + 0.3 * direct


def part(block: str, at: str, linear: bool = False) -> dict[str, torch.Tensor]:
    start = f"companions.{block}.{at}"
    return {
        name.removeprefix(start): value.double() for name, value in tensors(linear).items() if name.startswith(start)
    }


def unit(block: str, x: torch.Tensor, linear: bool = False) -> torch.Tensor:
    w = part(block, "projection.", linear)
    z = w["weight"] @ x if "weight" in w else w["3.weight"] @ (w["0.weight"] @ x + w["0.bias"]).clamp_min(0)
    return z / z.norm()


def sample(block: str, b: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return 3 * torch.randn(b, WIDTHS[block], generator=generator), torch.tensor([0, 5, 2, 2])


@pytest.mark.parametrize("block", list(WIDTHS))
def test_posteriors_are_those_of_the_formula(tmp_path, block):
    features, bins = sample(block)
    content = {name: value.double() for name, value in tensors().items()} if block == "mid" else tensors()
    david = opened(written(tmp_path, content), pattern_mode="joint")
    posterior = david.posterior(block, features, bins)
    model = david._block_models[block]
    for name, log_posterior in (("timestep_head", posterior.log_bins), ("pattern_head", posterior.log_patterns)):
        logits = model.get_submodule(name)(model(features)).double()
        for row, x in enumerate(features.double()):
            expected = logits_by_the_formula(part(block, f"{name}."), unit(block, x))
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(log_posterior[row].double(), expected.log_softmax(0), rtol=0, atol=1e-5)


def test_patterns_of_the_true_bin_are_the_joint_ones_given_the_bin(tmp_path):
    features, bins = sample("mid")
    joint = opened(written(tmp_path, tensors()), pattern_mode="joint").posterior("mid", features, bins).log_patterns
    inner = opened(tmp_path, pattern_mode="in_bin").posterior("mid", features, bins).log_patterns
    for row, k in enumerate(bins.tolist()):
        torch.testing.assert_close(inner[row], joint[row, k * P : (k + 1) * P].log_softmax(0))


def test_without_pattern_heads_bins_are_the_same_and_patterns_uniform(tmp_path):
    features, bins = sample("mid")
    whole = opened(written(tmp_path, tensors()), pattern_mode="in_bin")
    alone = opened(tmp_path)
    posterior, expected = (david.posterior("mid", features, bins) for david in (alone, whole))
    assert torch.equal(posterior.log_bins, expected.log_bins)
    assert torch.equal(posterior.inclusion, expected.inclusion)
    assert posterior.log_patterns.exp().flatten().tolist() == pytest.approx([1 / P] * P * 4)
    assert (alone.bins, alone.patterns, alone.blocks) == (T, P, tuple(WIDTHS))

    def held(david):
        return sum(p.nelement() for c in david._block_models.values() for p in c.parameters())

    assert held(alone) < held(whole) / 3


def test_a_posterior_depends_on_its_sample_alone(tmp_path):
    features, bins = sample("mid")
    david = opened(written(tmp_path, tensors()), pattern_mode="in_bin")
    whole, single = david.posterior("mid", features, bins), david.posterior("mid", features[2:3], bins[2:3])
    for name in ("log_bins", "log_patterns", "inclusion"):
        torch.testing.assert_close(getattr(single, name)[0], getattr(whole, name)[2])


def test_inclusion_is_one_on_a_vertex_of_the_bins_first_crystal(tmp_path):
    content = tensors()
    features, bins = sample("mid", b=1)
    content["companions.mid.crystal_pentachora"][0, 0, 3] = 5 * unit("mid", features[0].double())
    posterior = opened(written(tmp_path, content)).posterior("mid", features, bins[:1]).inclusion
    assert float(posterior) == pytest.approx(1, abs=1e-3)
    other = opened(tmp_path).posterior("mid", features, bins[1:2]).inclusion
    assert 0 < float(other) < 0.9


def test_alpha_is_the_stored_one(tmp_path):
    david = opened(written(tmp_path, tensors()))
    assert david.cantor_alphas == {b: float(tensors()[f"companions.{b}.cantor_stairs.alpha"]) for b in WIDTHS}


def test_the_older_version_reads_bins_off_its_trained_pattern_head(tmp_path, capsys):
    features, bins = sample("mid")
    posterior = opened(written(tmp_path, tensors(linear=True))).posterior("mid", features, bins)
    assert "untrained timestep head" in capsys.readouterr().out
    head = part("mid", "pattern_head.", linear=True)
    for row, x in enumerate(features.double()):
        joint = (head["weight"] @ unit("mid", x, linear=True) + head["bias"]).softmax(0)
        expected = joint.reshape(T, P).sum(1).log()
        torch.testing.assert_close(posterior.log_bins[row].double(), expected, rtol=1e-5, atol=1e-5)


def test_buffers_of_the_training_loss_are_ignored(tmp_path):
    extra = {"loss_calculator.rose_loss.role_weights": torch.ones(5)}
    extra |= {"loss_calculator.cayley_loss._triu_i": torch.arange(10)}
    assert opened(written(tmp_path, tensors() | extra)).blocks == tuple(WIDTHS)


NAMES = sorted(f"companions.mid.{name}" for name in block_shapes("mid", linear=False))


@pytest.mark.parametrize("name", NAMES[:: len(NAMES) // 12] + [n for n in NAMES if n.endswith("projection.0.bias")])
def test_a_missing_tensor_is_refused_by_name(tmp_path, name):
    content = tensors()
    del content[name]
    assert f"tensor {name} is missing" in refusal(tmp_path, content)


@pytest.mark.parametrize("name", ["companions.mid.projection.0.gain", "companions.mid.timestep_head.extra", "other"])
def test_an_extra_tensor_is_refused_by_name(tmp_path, name):
    assert f"tensor {name} has no place" in refusal(tmp_path, tensors() | {name: torch.zeros(2)})


@pytest.mark.parametrize(
    "name",
    [name for name in NAMES if len(tensors()[name].shape) == 2 and len(set(tensors()[name].shape)) == 2],
)
def test_a_transposed_tensor_is_refused_by_name(tmp_path, name):
    content = tensors()
    content[name] = content[name].T
    config = {**CONFIG, "block_configs": {block: {} for block in WIDTHS}}  # recognised without config.json too
    assert re.search(rf"tensor {re.escape(name)} has shape", refusal(tmp_path, content, config))


def test_other_models_are_refused_as_such(tmp_path):
    message = refusal(tmp_path, {"scales.256.weight": torch.zeros(2)}, {"feature_dim": 512})
    assert "no GeoDavidCollective" in message
    assert "scales.256.weight" in message
    assert "gated-david" in message
    assert "no GeoDavidCollective" in refusal(tmp_path, tensors(), {"feature_dim": 512})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_timestep_bins": 100}, "has 6, config.json has num_timestep_bins = 100"),
        ({"num_patterns_per_bin": 10}, "has 3, config.json has num_patterns_per_bin = 10"),
        ({"block_configs": {"mid": {}}}, "config.json names ['mid']"),
        (
            {"block_configs": {"mid": {"input_dim": 1280}, "down_0": {}}},
            "has 14, config.json has block_configs.mid.in",
        ),
    ],
)
def test_a_configuration_that_contradicts_its_weights_is_refused(tmp_path, change, message):
    assert message in refusal(tmp_path, tensors(), CONFIG | change)


def test_features_from_elsewhere_are_refused(tmp_path):
    written(tmp_path, tensors())
    with pytest.raises(Refused, match="last resnet of each block, spatial mean, fp32; this cache has: whole blocks"):
        PublishedAssessor.open(tmp_path, "whole blocks", WIDTHS, 1000)
    with pytest.raises(Refused, match="block mid takes 14 channels, this cache has 1280"):
        PublishedAssessor.open(tmp_path, HOOK_POINT, WIDTHS | {"mid": 1280}, 1000)
    with pytest.raises(Refused, match="assesses block mid, the cache has none"):
        PublishedAssessor.open(tmp_path, HOOK_POINT, {"down_0": 10}, 1000)
    assert OURS == HOOK_POINT


def test_broken_files_are_refused(tmp_path):
    with pytest.raises(Refused, match="cannot be read as a published David"):
        opened(tmp_path)
    written(tmp_path, tensors())
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(Refused, match="cannot be read as a published David"):
        opened(tmp_path)
    content = tensors()
    content["companions.mid.pattern_head.class_bias"][1] = float("nan")
    with pytest.raises(Refused, match=r"mid\.pattern_head\.class_bias holds numbers that are not finite"):
        opened(written(tmp_path, content), pattern_mode="joint")
    name = "companions.mid.role_weights"
    assert f"tensor {name} has type I64" in refusal(tmp_path, tensors() | {name: torch.arange(5)})


WIDE = {"down_0": (320, 64), "down_1": (640, 96), "down_2": (1280, 128), "down_3": (1280, 128), "mid": (1280, 256)}
WIDE |= {"up_0": (1280, 128), "up_1": (1280, 128), "up_2": (640, 96), "up_3": (320, 64)}


def full_size(block: str, belly: float, experts: int) -> BlockSizes:
    n, d = WIDE[block]
    heads = (HeadSizes(classes, 2 * classes, experts, experts) for classes in (100, 1000))
    return BlockSizes(n, int(d * belly), d, 100, 10, *heads)


def parameters_by_the_formula(n: int, d: int, h: int, experts: int) -> int:
    """david.md 1.7."""

    def head(k):
        b, gates = 2 * k, experts
        c = experts * b
        gate = c * (c // 2) + c // 2 + (c // 2) * k + k
        return 2 + experts * (d * b + 3 * b) + 4 * b * b + 4 * b + gates * gate + gates + k + c * k + 3 * k

    return n * h + h + h * d + 5000 * d + (1 + d + 1) + head(100) + head(1000)


def test_at_full_size_the_key_list_and_the_count_are_the_published_ones():
    mid = meta_block_model(full_size("mid", 4, 4))
    assert len(mid.state_dict()) == 97
    assert sum(p.nelement() for p in mid.parameters()) == 174_848_558
    total = 0
    for block, (n, d) in WIDE.items():
        experts = 4 if block == "mid" else 3
        model = meta_block_model(full_size(block, 2.0, experts))
        count = sum(p.nelement() for p in model.parameters())
        assert count == parameters_by_the_formula(n, d, 2 * d, experts)
        total += count
    assert total == 872_707_726


def test_sizes_are_read_off_the_shapes_at_full_size():
    expected = {block: full_size(block, 4 if block == "mid" else 2, 4 if block == "mid" else 3) for block in WIDE}
    shapes = {
        f"companions.{block}.{name}": tuple(tensor.shape)
        for block, sizes in expected.items()
        for name, tensor in meta_block_model(sizes).state_dict().items()
    }
    config = {"block_configs": {block: {"input_dim": n, "scale_dim": d} for block, (n, d) in WIDE.items()}}
    assert infer_block_sizes(TensorHeader("a", shapes), config) == expected
