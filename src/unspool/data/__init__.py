"""Data: one source per file; every source gives the same `Batch` and is a pure function of the step.

`SOURCES` maps a name to "module:Class"; a user's own "module:Class" stands beside them.
"""

from __future__ import annotations

SOURCES: dict[str, str] = {
    "stage": "unspool.data.stage:StageClips",
    "videos": "unspool.data.videos:VideoFolder",
    "latents": "unspool.data.shards:LatentShards",
    "prompts": "unspool.data.prompts:PromptList",
    "ode-lmdb": "unspool.data.ode_lmdb:OdeLmdb",
}
"""Name -> "module:Class"."""
