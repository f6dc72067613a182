"""Checkpoint IO that knows no network: reading, key maps, LoRA, strict loading with a report, atomic writing.

Key names of a particular network come in as `KeyMap`s from `models/`; nothing here executes a pickle's code.
"""

from __future__ import annotations

from unspool.weights.files import find_files, is_local, resolve, sha256_of
from unspool.weights.keymap import KeyMap, Rule, detect_format
from unspool.weights.lora import Lora, merge_lora, read_lora
from unspool.weights.names import choose_wrapper, strip_prefixes
from unspool.weights.read import Checkpoint, read_checkpoint
from unspool.weights.report import LoadReport, Mismatch, compare, load_into, parse_dtype
from unspool.weights.write import save_file, save_sharded

__all__ = [
    "Checkpoint",
    "KeyMap",
    "LoadReport",
    "Lora",
    "Mismatch",
    "Rule",
    "choose_wrapper",
    "compare",
    "detect_format",
    "find_files",
    "is_local",
    "load_into",
    "merge_lora",
    "parse_dtype",
    "read_checkpoint",
    "read_lora",
    "resolve",
    "save_file",
    "save_sharded",
    "sha256_of",
    "strip_prefixes",
]
