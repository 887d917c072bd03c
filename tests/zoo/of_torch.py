"""Transformers made of torch's own layers, and an attention that keeps them from being fused."""

import torch
from torch import nn

from tests.zoo.case import ZooCase

_SIZES = {"d_model": 32, "nhead": 4, "dim_feedforward": 64, "batch_first": True}


def _encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(**_SIZES), 2)


def _padded(batch):
    mask = torch.zeros(batch, 12, dtype=torch.bool)
    mask[-1, 9:] = True
    return {"src": torch.randn(batch, 12, 32), "src_key_padding_mask": mask}


def _transformer():
    return nn.Transformer(**_SIZES, num_encoder_layers=1, num_decoder_layers=1)


def _pairs(batch):
    return {"src": torch.randn(batch, 12, 32), "tgt": torch.randn(batch, 7, 32)}


MODELS = {"encoder": ZooCase(_encoder, _padded), "transformer": ZooCase(_transformer, _pairs)}
