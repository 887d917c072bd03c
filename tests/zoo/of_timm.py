"""Models of timm, narrowed until they are tiny."""

import timm
import torch
from timm.models import EfficientNet, MlpMixer, RegNet
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.byobnet import ByoBlockCfg
from timm.models.regnet import RegNetCfg

from tests.zoo.case import ZooCase


def _images(size):
    return lambda batch: torch.randn(batch, 3, size, size)


def _unfused(model):
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def _named(name, size=64, **smaller):
    return ZooCase(
        lambda: timm.create_model(name, num_classes=10, **smaller), _images(size), _unfused
    )


def _efficientnet():
    stages = ["ds_r1_k3_s1_e1_c16_se0.25", "ir_r1_k3_s2_e6_c24_se0.25", "ir_r2_k5_s2_e6_c40_se0.25"]
    blocks = decode_arch_def([[stage] for stage in stages])
    return EfficientNet(blocks, num_features=64, stem_size=16, num_classes=10)


_REP = tuple(ByoBlockCfg(type="rep", d=d, c=c) for d, c in ((1, 16), (2, 32), (1, 48)))
_IMAGE = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 4}

MODELS = {
    "resnet50": _named(
        "resnet50",
        zero_init_last=False,
        layers=(1, 1, 1, 1),
        channels=(16, 32, 48, 64),
        stem_width=16,
    ),
    "convnext": _named("convnext_tiny", depths=(1, 1, 1, 1), dims=(16, 32, 48, 64)),
    "mobilenetv3": _named("mobilenetv3_small_050"),
    "efficientnet": ZooCase(_efficientnet, _images(64)),
    "regnet": ZooCase(
        lambda: RegNet(
            RegNetCfg(4, 16, 24.0, 1.5, 8, se_ratio=0.25, stem_width=16),
            num_classes=10,
            zero_init_last=False,
        ),
        _images(64),
    ),
    "swin": _named(
        "swin_tiny_patch4_window7_224",
        img_size=64,
        window_size=4,
        embed_dim=32,
        depths=(2, 2),
        num_heads=(2, 4),
    ),
    "vit": _named("vit_tiny_patch16_224", 32, **_IMAGE),
    "mixer": ZooCase(lambda: MlpMixer(10, img_size=64, embed_dim=48, num_blocks=2), _images(64)),
    "densenet": _named("densenet121", growth_rate=16, block_config=(2, 2, 2, 2)),
    "maxvit": _named(
        "maxvit_tiny_tf_224",
        img_size=64,
        embed_dim=(32, 64),
        depths=(1, 1),
        block_type=("M", "M"),
        stem_width=16,
        head_hidden_size=64,
    ),
    "cait": _named("cait_xxs24_224", 32, **_IMAGE),
    "repvgg": _named("repvgg_a0", blocks=_REP, stem_chs=16),
}
