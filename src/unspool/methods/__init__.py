"""Training objectives: one per file, no optimizer, no distribution, no logging. `METHODS` maps names to classes."""

from __future__ import annotations

METHODS: dict[str, str] = {
    "flow_matching": "unspool.methods.flow_matching:FlowMatching",
    "diffusion_forcing": "unspool.methods.diffusion_forcing:DiffusionForcing",
    "teacher_forcing": "unspool.methods.teacher_forcing:TeacherForcing",
    "clean_prefix": "unspool.methods.clean_prefix:CleanPrefix",
    "ode_regression": "unspool.methods.ode_regression:OdeRegression",
    "consistency": "unspool.methods.consistency:CausalConsistency",
    "dmd": "unspool.methods.dmd:DistributionMatching",
    "parsing": "unspool.methods.parsing:CaptionParsing",
    "codec": "unspool.methods.codec:CodecTraining",
}
"""Name -> "module:Class"."""
