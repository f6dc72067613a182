"""Networks, codecs and text encoders; each accepts and gives back only arrays, prompts and contexts."""

from __future__ import annotations

BACKBONES = {
    "wan": "unspool.models.wan.network:WanTransformer",
    "stdit": "unspool.models.stdit.network:STDiT",
}
