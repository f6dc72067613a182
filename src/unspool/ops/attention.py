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


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of q [b, n, heads, d] over k, v [b, m, heads, d]; `mask` [n, m] is True where q reads k."""
    k, v = k.to(q.dtype), v.to(q.dtype)  # a cache may store another precision than it is read in
    out = scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2)


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

    return compiled("torch.nn.attention.flex_attention:flex_attention")
