"""Which Linear layers are several in one, such as queries, keys and values, by their names."""

from collections.abc import Sequence
from dataclasses import replace

from tdecomp.layers.spec import LayerSpec

# By the last part of a layer's name, what libraries fuse in it: "qkv" are queries, keys and values,
# "halves" are two layers of one size. Where a layer's outputs are in another order (GPT-NeoX and
# BLOOM have each head's queries, keys and values side by side) such parts hold whole heads.
_FUSED = {
    "qkv": "qkv", "qkv_proj": "qkv", "to_qkv": "qkv", "to_added_qkv": "qkv", "Wqkv": "qkv",
    "c_attn": "qkv", "query_key_value": "qkv", "in_proj_weight": "qkv",
    "kv": "halves", "kv_proj": "halves", "to_kv": "halves",
    "gate_up_proj": "halves", "weights_in": "halves", "w12": "halves",
}  # fmt: skip


def with_parts(spec: LayerSpec | None, names: Sequence[str]) -> LayerSpec | None:
    """The spec with the sizes of its parts, where one of the layer's names is that of a fused one.

    >>> from tdecomp.model.fused import with_parts
    >>> with_parts(LayerSpec(64, 192), ["encoder.0.attn.qkv"]).parts
    (64, 64, 64)
    >>> with_parts(LayerSpec(64, 96), ["model.layers.0.self_attn.qkv_proj"]).parts
    (64, 16, 16)
    """
    fused = next((_FUSED[last] for name in names if (last := _last(name)) in _FUSED), None)
    if spec is None or fused is None or spec.ndim or spec.groups > 1 or spec.parts:
        return spec  # of experts each has parts of its own
    return replace(spec, parts=_sizes(spec.in_channels, spec.out_channels, fused))


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _sizes(into: int, out: int, fused: str) -> tuple[int, ...]:
    """The sizes of the parts, or none where these outputs cannot have them."""
    if fused == "halves" or out == 2 * into:  # such as the keys and values of cross-attention
        return (out // 2,) * 2 if out % 2 == 0 and out else ()
    if out == 3 * into:
        return (into,) * 3
    if out > into and (out - into) % 2 == 0:  # several queries share one key (grouped queries)
        shared = (out - into) // 2
        return into, shared, shared
    return ()
