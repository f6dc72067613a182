"""Noise algebra: processes and schedules, no networks. Importing this package does not import torch."""

from __future__ import annotations

PROCESSES: dict[str, str] = {
    "flow": "unspool.diffusion.flow:FlowMatching",
    "iddpm": "unspool.diffusion.iddpm:IDDPM",
}
"""Name of a process -> "module:Class"; a user's own "module:Class" may stand wherever a name is accepted."""
