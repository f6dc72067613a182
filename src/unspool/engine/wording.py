"""Prompts to text states, remembered, and what a prompt says that the model cannot follow.

Any text is a prompt: an empty one is the unconditional prompt, words that are not known are reported and ignored.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

KEPT_PROMPTS = 16
SHOWN_WORDS = 8
SHOWN_CHARACTERS = 24


@runtime_checkable
class TextEncoder(Protocol):
    """What the engine asks of a text encoder."""

    def __call__(self, captions: list[str]) -> Tensor:
        """States [n, rows, channels]; "" is the unconditional prompt."""
        ...


@runtime_checkable
class KnowsItsWords(Protocol):
    """A text encoder that can say which words of a caption have no effect."""

    def unknown(self, caption: str) -> list[str]: ...


class Wording:
    """One text encoder and the states of the last prompts. Each prompt is encoded alone, so that its states do not
    depend on what it is batched with. Threads may share it."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    @torch.no_grad()
    def states(self, prompts: Sequence[str]) -> Tensor:
        """States [b, rows, channels] of the prompts of a batch."""
        with self._lock:
            return torch.cat([self._one(prompt) for prompt in prompts])

    def _one(self, prompt: str) -> Tensor:
        if not isinstance(prompt, str):
            raise ValueError(f"got the prompt {prompt!r}, a {type(prompt).__name__}; expected text")
        if prompt not in self._kept:
            self._kept[prompt] = self.encoder([prompt.strip()]).detach()
            while len(self._kept) > KEPT_PROMPTS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(prompt)
        return self._kept[prompt]

    def notes(self, prompt: str) -> list[str]:
        """What the user should know about a prompt, in sentences; nothing where all of it is understood."""
        if not prompt.strip():
            return ["the prompt is empty: the model makes what it likes (unconditional)"]
        if not isinstance(self.encoder, KnowsItsWords):
            return []
        unknown = self.encoder.unknown(prompt)
        if not unknown:
            return []
        shown = ", ".join(_short(word) for word in unknown[:SHOWN_WORDS])
        more = f" and {len(unknown) - SHOWN_WORDS} more" if len(unknown) > SHOWN_WORDS else ""
        return [f"ignored, because the model does not know or has no room for it: {shown}{more}"]


def _short(word: str) -> str:
    return word if len(word) <= SHOWN_CHARACTERS else word[: SHOWN_CHARACTERS - 3] + "..."
