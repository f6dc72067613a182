"""TAEHV, a small causal video codec: 4x in time, 8x in space, whole or as a stream.

Layout and key names are those of the published `taew2_1` files, so they load; narrower own ones are the same class.
"""

from __future__ import annotations

from unspool.models.taehv.config import TaehvConfig
from unspool.models.taehv.network import DecodeState, EncodeState, Taehv

__all__ = ["DecodeState", "EncodeState", "Taehv", "TaehvConfig"]
