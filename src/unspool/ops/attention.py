"""Attention over tokens `b n heads d`: one function per backend, every backend proven equal to `sdpa` in tests.

No backend takes a padding length: what may be read is decided by slicing or gathering keys, or by a block mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


_EXPLICIT_SCORES, _SLICE_SCORES = 2**20, 2**14
"""Most scores per head for which the explicit form is taken, and how many a slice of queries makes at a time."""


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of q [b, n, heads, d] over k, v [b, m, heads, d]; `mask` [n, m] is True where q reads k, or
    whatever broadcasts to [b, heads, n, m].

    Training on a CPU takes `explicit` for short sequences: the backward pass of torch's CPU flash kernel is slow there.
    """
    k, v = k.to(q.dtype), v.to(q.dtype)  # a cache may store another precision than it is read in
    if _learns_on_cpu(q, k, v) and q.shape[1] * k.shape[1] <= _EXPLICIT_SCORES:
        return explicit(q, k, v, mask)
    out = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2)


def explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`sdpa` by two matrix products and a softmax in at least fp32, a few queries at a time so that scores stay in the
    processor's cache; the probabilities are kept for the backward pass."""
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    heads = [x.transpose(1, 2).flatten(0, 1) for x in (q * q.shape[-1] ** -0.5, k, v)]  # copied once: [b heads, n, d]
    queries, keys, values = heads[0], heads[1].mT, heads[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    size = max(_SLICE_SCORES // k.shape[1], 16)
    outputs = []
    for number, part in enumerate(queries.split(size, dim=1)):
        scores = part @ keys
        if mask is not None:
            read = mask if mask.shape[-2] == 1 else mask[..., number * size : (number + 1) * size, :]
            scores = scores.unflatten(0, (q.shape[0], q.shape[2])).masked_fill(~read, -torch.inf).flatten(0, 1)
        outputs.append(torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype) @ values)
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return out.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


def _learns_on_cpu(*tensors: Tensor) -> bool:
    return tensors[0].device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """FlexAttention under a block mask; for CUDA training (no CPU backward, slow uncompiled)."""
    from torch.nn.attention.flex_attention import flex_attention

    if q.device.type == "cpu" and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        raise ValueError("backend='flex' has no CPU backward; use backend='slices' on the CPU")
    kernel = _compiled_flex() if q.is_cuda else flex_attention
    out = kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def _compiled_flex():  # type: ignore[no-untyped-def]
    """FlexAttention compiled: without it the scores are materialised."""
    from unspool.ops.compile import compiled

    return compiled("torch.nn.attention.flex_attention:flex_attention", "cuda")
