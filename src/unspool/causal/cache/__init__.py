"""How the past is kept and read. One policy per file; `KVCache` serves every policy of indices."""

from __future__ import annotations

CACHES = {
    "kv": "unspool.causal.cache.kv:KVCache",
    "streams": "unspool.causal.cache.streams:StreamCaches",
    "steps": "unspool.causal.cache.steps:StepCaches",
    "recompute": "unspool.causal.cache.recompute:Recompute",
    "recompute_bidirectional": "unspool.causal.cache.recompute:RecomputeBidirectional",
}
