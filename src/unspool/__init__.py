"""Streaming autoregressive video diffusion: one causal network, one exact cache, one rollout.

Importing this package imports nothing else: the names below are loaded at first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY: dict[str, str] = {
    "Absolute": "unspool.causal.position:Absolute",
    "ChunkPlan": "unspool.causal.chunks:ChunkPlan",
    "CounterNoise": "unspool.rollout.noise:CounterNoise",
    "Euler": "unspool.rollout.solvers.euler:Euler",
    "FewStep": "unspool.rollout.solvers.fewstep:FewStep",
    "Full": "unspool.causal.visibility:Full",
    "Guidance": "unspool.rollout.guidance:Guidance",
    "KVCache": "unspool.causal.cache.kv:KVCache",
    "ModelSpec": "unspool.engine.model_folder:ModelSpec",
    "Multistep": "unspool.rollout.solvers.multistep:Multistep",
    "Pipeline": "unspool.engine.pipeline:Pipeline",
    "PromptTimeline": "unspool.rollout.prompts:PromptTimeline",
    "Rollout": "unspool.rollout.rollout:Rollout",
    "RolloutConfig": "unspool.rollout.settings:RolloutConfig",
    "RolloutSettings": "unspool.engine.settings:RolloutSettings",
    "Schedule": "unspool.diffusion.schedule:Schedule",
    "Session": "unspool.engine.session:Session",
    "Switch": "unspool.rollout.prompts:Switch",
    "Video": "unspool.engine.video:Video",
    "WanConfig": "unspool.models.wan.config:WanConfig",
    "WanTransformer": "unspool.models.wan.network:WanTransformer",
    "Window": "unspool.causal.visibility:Window",
    "WindowRelative": "unspool.causal.position:WindowRelative",
    "compile_backbone": "unspool.ops.compile:compile_backbone",
    "contact_sheet": "unspool.engine.export:contact_sheet",
    "few_step": "unspool.diffusion.schedule:few_step",
    "load": "unspool.engine.load:load",
    "read_metadata": "unspool.engine.export:read_metadata",
    "save_model_folder": "unspool.engine.model_folder:save_model_folder",
    "uniform": "unspool.diffusion.schedule:uniform",
    "write_video": "unspool.engine.export:write_video",
}
"""Public name -> "module:attribute"."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value: Any = version("unspool")
        except PackageNotFoundError:  # run from a source tree that was never installed
            value = "0+unknown"
    elif name in _LAZY:
        module, _, attribute = _LAZY[name].partition(":")
        value = getattr(importlib.import_module(module), attribute)
    else:
        raise AttributeError(f"module 'unspool' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "__version__"})
