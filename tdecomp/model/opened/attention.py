"""`nn.MultiheadAttention` whose projections are layers, called and answering as before."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from tdecomp.model.opened.base import Opened, linear_of, own_weights

_PACKED = "in_proj_weight"
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class OpenAttention(Opened, nn.MultiheadAttention):
    """Attention whose in-projection `in_proj_weight` is a Linear layer, or a chain in its place.

    `in_proj_bias` is None, which also keeps the layer around it from torch's fused kernel.
    """

    names: ClassVar[tuple[str, ...]] = (_PACKED,)

    @classmethod
    def opens(cls, module: nn.Module) -> bool:
        if type(module) is not nn.MultiheadAttention or "forward" in vars(module):
            return False
        names = (_PACKED, *_SEPARATE, "in_proj_bias")
        if not module._parameters.keys() >= {*names}:  # pruned, or of a norm: it computes one
            return False
        held = own_weights(module, names)
        return bool(held) and (cls is SeparateAttention or _PACKED in held)

    def open_up(self) -> None:
        held = self._parameters
        bias, held["in_proj_bias"] = held["in_proj_bias"], None
        self._hold({_PACKED: (held.pop(_PACKED), bias)})

    def close_up(self) -> None:
        layer = self._modules.pop(_PACKED)
        assert isinstance(layer, nn.Linear)
        self._take({_PACKED: layer._parameters["weight"], "in_proj_bias": layer.bias})

    def closed_name(self, layer: str, *, bias: bool) -> str:
        if bias:
            return "in_proj_bias"
        return _PACKED if self._qkv_same_embed_dim else layer

    def _hold(self, layers: Mapping[str, tuple[Any, Any]]) -> None:
        for name, (weight, bias) in layers.items():
            self.add_module(name, linear_of(weight, bias).train(self.training))
        self.closed_out = type(self.out_proj)
        self._modules["out_proj"] = self._modules.pop("out_proj")  # it comes last

    def _take(self, values: Mapping[str, nn.Parameter | None]) -> None:
        """Have these as its own parameters again, in torch's order."""
        held = self._parameters
        before = dict(held)
        held.clear()
        held.update(dict.fromkeys((_PACKED, *_SEPARATE)))
        held.update({**before, **values})
        out, kind = self.out_proj, vars(self).pop("closed_out")
        if type(out) is nn.Linear and issubclass(kind, nn.Linear):  # made of a chain since
            out.__class__ = kind  # torch's own, whose weight is read and must not be quantized

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention` computes it; the first dimension is the batch inside."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True is a hint about attn_mask: give that as well")
        batched = query.dim() == 3
        q, k, v = self._projected(query, key, value)
        if not batched:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        batch, length, size = q.shape
        added = 0  # keys that the masks do not know of
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(batch, 1, size)], dim=1)
            v = torch.cat([v, self.bias_v.expand(batch, 1, size)], dim=1)
            added += 1
        q, k, v = self._heads(q), self._heads(k), self._heads(v)  # (batch, heads, length, size)
        if self.add_zero_attn:
            zero = torch.zeros_like(k[:, :, :1])
            k, v, added = torch.cat([k, zero], dim=2), torch.cat([v, zero], dim=2), added + 1
        causal = is_causal and key_padding_mask is None and not need_weights
        mask: Tensor | None = None
        if not causal:
            mask = self._mask(attn_mask, key_padding_mask, q, k.shape[2] - added)
        if mask is not None and added:
            mask = functional.pad(mask, (0, added))
        weights: Tensor | None = None
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = (q * math.sqrt(1.0 / float(q.shape[3]))) @ k.transpose(2, 3)
            if mask is not None:
                scores = scores + mask
            # One dimension for batch and heads, as in torch: dropout then draws the same numbers.
            shares = functional.softmax(scores.flatten(0, 1), dim=-1)
            shares = functional.dropout(shares, dropout) if dropout > 0.0 else shares
            weights = shares.unflatten(0, (batch, self.num_heads))
            out = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            out = functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        # Laid out as torch's own, so that a dropout behind it draws the same numbers.
        out = self.out_proj(out.permute(2, 0, 1, 3).reshape(length, batch, size))
        if not batched:
            return out.squeeze(1), None if weights is None else weights.squeeze(0)
        return out.transpose(0, 1) if self.batch_first else out, weights

    def _projected(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.in_proj_weight(query).chunk(3, dim=-1)  # type: ignore[operator]
        # Inputs that differ take their own part of it, at the cost of all three.
        if key is not query:
            k, v = self.in_proj_weight(key).chunk(3, dim=-1)[1:]  # type: ignore[operator]
        if value is not key:
            v = self.in_proj_weight(value).chunk(3, dim=-1)[2]  # type: ignore[operator]
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        split: Tensor = x.unflatten(2, (self.num_heads, self.head_dim))
        return split.transpose(1, 2)

    def _mask(
        self, attention: Tensor | None, padding: Tensor | None, q: Tensor, keys: int
    ) -> Tensor | None:
        """Both masks as numbers to add to the scores, of a shape that spreads over these."""
        batch, heads, length, _ = q.shape  # plain ifs, as torch.jit.script reads them
        if attention is not None:
            attention = _added(attention, q.dtype)
            size, plane = attention.shape, (length, keys)
            fits = attention.dim() == 2 and size[0] == length and size[1] == keys
            if attention.dim() == 3 and size[0] == batch * heads:
                fits = size[1] == length and size[2] == keys
            if not fits:
                expected = f"{plane}, or that for each of {batch * heads} heads"
                raise RuntimeError(f"attn_mask: expected the shape {expected}; got {size}")
            if attention.dim() == 3:
                attention = attention.unflatten(0, (batch, heads))
        if padding is None:
            return attention
        if padding.dim() != 2 or padding.shape[0] != batch or padding.shape[1] != keys:
            raise RuntimeError(f"key_padding_mask: expected {(batch, keys)}, got {padding.shape}")
        hidden = _added(padding, q.dtype)[:, None, None, :]
        return hidden if attention is None else attention + hidden


class SeparateAttention(OpenAttention):
    """Attention with a projection each for queries, keys and values, as where their inputs differ.

    They may be the parts of one weight.
    """

    names = _SEPARATE

    def open_up(self) -> None:
        held, size = self._parameters, self.embed_dim
        packed, held[_PACKED] = held[_PACKED], None
        bias, held["in_proj_bias"] = held["in_proj_bias"], None
        layers = {}
        for i, name in enumerate(_SEPARATE):
            part, weight = slice(i * size, (i + 1) * size), held.pop(name)
            own_bias = None if bias is None else _part(bias, part)
            layers[name] = (weight if packed is None else _part(packed, part), own_bias)
        self._hold(layers)

    def close_up(self) -> None:
        layers: list[Any] = [self._modules.pop(name) for name in _SEPARATE]
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        bias = None if biases[0] is None else _joined(biases)
        if self._qkv_same_embed_dim:
            self._take({_PACKED: _joined(weights), "in_proj_bias": bias})
        else:
            self._take({**dict(zip(_SEPARATE, weights, strict=True)), "in_proj_bias": bias})

    def _projected(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        return q(query), k(key), v(value)  # type: ignore[operator]


def _part(packed: nn.Parameter, part: slice) -> nn.Parameter:
    return nn.Parameter(packed.data[part], packed.requires_grad)


def _joined(parts: list[nn.Parameter]) -> nn.Parameter:
    return nn.Parameter(torch.cat([part.data for part in parts]), parts[0].requires_grad)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores; where a mask of truth values is true, minus infinity."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)
