"""Models of diffusers from tiny configurations."""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

from tests.zoo.case import ZooCase


def _unet():
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24, attention_head_dim=4,
    )  # fmt: skip


def _autoencoder():
    return AutoencoderKL(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def _noisy(batch):
    return {
        "sample": torch.randn(batch, 4, 8, 8),
        "timestep": torch.tensor([10] * batch),
        "encoder_hidden_states": torch.randn(batch, 7, 24),
    }


def _written_out(model):
    model.set_attn_processor(AttnProcessor())


# Budgets over more take minutes for so many layers, and show nothing else.
_CLOSED = ("svd", "lowrank")

MODELS = {
    "unet": ZooCase(_unet, _noisy, _written_out, methods=_CLOSED),
    "autoencoder": ZooCase(
        _autoencoder, lambda batch: torch.randn(batch, 3, 16, 16), _written_out, methods=_CLOSED
    ),
}
