"""The operations of the teacher's network, counted without computing any."""

import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from configs.values import PictureSize
from stages.nets.teacher import Teacher


def pass_operations(teacher: Teacher, size: PictureSize) -> int:
    """The multiplications of one latent's pass, each counted with its addition as two.

    Of a network without values: the kernels by which a processor computes attention are not all known to the counter.
    """
    parts = teacher.components
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unet = UNet2DConditionModel.from_config(parts.unet.config)
        cond = torch.zeros(1, parts.tokenizer.model_max_length, unet.config["cross_attention_dim"])
        unet(torch.zeros(1, *parts.latent_shape(size)), 500, cond)
    return int(counter.get_total_flops())
