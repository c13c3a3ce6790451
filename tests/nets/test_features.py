"""Laws of the tap on a UNet's blocks."""

import pytest
import torch

from shards.record import BLOCKS
from stages.nets.features import FeatureTap, feature_widths, last_resnets
from stages.tiny.anatomy import LATENT, TEXT_WIDTH, build_unet


def test_the_nine_blocks_are_named_in_the_order_in_which_they_run() -> None:
    unet = build_unet()
    assert tuple(last_resnets(unet)) == BLOCKS
    assert list(feature_widths(unet).values()) == [32, 64, 64, 64, 64, 64, 64, 64, 32]


def test_a_feature_is_the_spatial_mean_of_the_blocks_last_resnet() -> None:
    torch.manual_seed(0)
    unet, outputs = build_unet(), []
    unet.mid_block.resnets[-1].register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    tap = FeatureTap(unet)
    unet(torch.randn(3, 4, LATENT, LATENT), torch.tensor([1, 2, 3]), torch.randn(3, 5, TEXT_WIDTH))
    features = tap.pop_features(slice(0, 2))
    assert torch.equal(features["mid"], outputs[0].mean((2, 3))[:2])
    assert all(len(feature) == 2 for feature in features.values())


def test_a_tap_is_empty_after_it_was_taken() -> None:
    tap = FeatureTap(build_unet())
    assert not tap.pop_features(slice(None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_float32_whatever_the_network_computes_in(dtype: torch.dtype) -> None:
    unet = build_unet().to(dtype)
    tap = FeatureTap(unet)
    unet(torch.zeros(1, 4, LATENT, LATENT, dtype=dtype), 1, torch.zeros(1, 5, TEXT_WIDTH, dtype=dtype))
    assert {feature.dtype for feature in tap.pop_features(slice(None)).values()} == {torch.float32}
