"""Prompts over the time of a stream: what text each chunk follows and how the past is treated at a switch.

A switch takes effect at the first chunk that starts at or after its latent frame. Policies:

- `keep`: the text changes, cached keys keep the old prompt (CausVid's only form).
- `recache`: keys and values of the kept clean latents are computed again under the new text, causal chunk by chunk.
- `recache_bidirectional`: the same in one forward in which all recached frames see each other: LongLive 1.0 as
  published (arXiv:2509.22622) and as its weights were trained, its unprotected early sink included.
- `flush`: the cache forgets all but the sink and the last latent frame (Infinity-RoPE, arXiv:2511.20649).

`sink` says what a recache does with the sink: `kept` leaves its keys under the old prompt, `replaced` makes the oldest
recached latent frames the new sink, `recomputed` computes it again from the stream's true first latent frames.
`over` blends the text of the chunk before into the new one linearly over that many chunks (policy `keep` only).
"""

from __future__ import annotations

import copy
from bisect import insort
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from unspool.annotations import check_word
from unspool.causal.cache.snapshot import Snapshot

MAX_BLEND = 64  # chunks: as far back as a stream remembers where its chunks started

SwitchPolicy = Literal["keep", "recache", "recache_bidirectional", "flush"]
SinkPolicy = Literal["kept", "replaced", "recomputed"]


@dataclass(frozen=True, kw_only=True)
class Switch:
    """One change of prompt. `text` [b, rows, channels]; fields as in the module's docstring."""

    frame: int
    text: Tensor
    policy: SwitchPolicy = "recache"
    sink: SinkPolicy = "kept"
    over: int = 1

    def __post_init__(self) -> None:
        check_word("policy", self.policy, SwitchPolicy)
        check_word("sink", self.sink, SinkPolicy)
        if self.frame < 0 or not 1 <= self.over <= MAX_BLEND:
            raise ValueError(f"frame={self.frame}, over={self.over}: expected frame >= 0 and over in 1..{MAX_BLEND}")
        if self.over > 1 and self.policy != "keep":
            raise ValueError(
                f"over={self.over} blends texts and policy={self.policy!r} acts once; use policy='keep' with over > 1"
            )
        check_text(self.text)


@dataclass(frozen=True)
class Moment:
    """What holds for one chunk: number of its prompt, how far its text has replaced the one before (1: fully), the
    switches that it begins in order, and the text itself [b, rows, channels]."""

    prompt: int
    weight: float
    begins: tuple[Switch, ...]
    text: Tensor


def check_text(text: Tensor, *, wait: bool = False) -> None:
    """Raise ValueError unless `text` is finite [b, rows, channels]; on a GPU values are looked at where the host may
    `wait` for it: once at the beginning of a stream, and not at every step of a training."""
    if text.ndim != 3:
        raise ValueError(f"text of shape {tuple(text.shape)}: expected [b, rows, channels]")
    if (wait or text.device.type == "cpu") and not bool(torch.isfinite(text).all()):
        raise ValueError("text holds NaN or infinity; expected finite values: check the text encoder's dtype")


class PromptTimeline:
    """The prompts of a stream in order of time. A rollout works on a copy: add to it by `Rollout.switch`. `wait` as
    `check_text`; a rollout that is given a text sets it, a training does not."""

    def __init__(self, text: Tensor, switches: list[Switch] | None = None, *, wait: bool = False) -> None:
        check_text(text, wait=wait)
        self.first = text.clone()  # encoded when its chunk comes, so it must not change until then
        self.pruned = 0  # switches that were forgotten because later ones took over
        self.switches: list[Switch] = []
        for switch in switches or []:
            self.add(switch)

    def add(self, switch: Switch) -> None:
        """Put a switch in its place in time, behind those of the same frame. ValueError for another batch or width.

        Prompts are numbered in order of time, so one that is added before planned ones moves their numbers on.
        """
        if switch.text.shape[0] != self.first.shape[0] or switch.text.shape[2] != self.first.shape[2]:
            raise ValueError(
                f"switch text {tuple(switch.text.shape)}: expected [{self.first.shape[0]}, rows, {self.first.shape[2]}]"
            )
        own = replace(switch, text=switch.text.clone())  # as `first`
        insort(self.switches, own, key=lambda s: s.frame)

    def copy(self) -> PromptTimeline:
        """A timeline of its own with the same texts: a rollout forgets what is over, the given one stays whole."""
        twin = copy.copy(self)
        twin.switches = list(self.switches)
        return twin

    def moment(self, starts: list[int], last: Tensor | None = None) -> Moment:
        """What holds for the last of the chunks that start at `starts`; `last` is the text of the chunk before it.

        A blend goes on from `last`, so a switch in the middle of another blend does not jump.
        """
        current, previous = starts[-1], (starts[-2] if len(starts) > 1 else -1)
        index = sum(1 for s in self.switches if s.frame <= current)
        if index == 0:
            return Moment(self.pruned, 1.0, (), self.first)
        switch = self.switches[index - 1]
        begins = tuple(s for s in self.switches[:index] if s.frame > previous)
        since = sum(1 for start in starts if start >= switch.frame)
        number = self.pruned + index
        if since >= switch.over:
            return Moment(number, 1.0, begins, switch.text)
        old = self.first if last is None else last
        text = self.mix(old, switch.text, 1 / (switch.over - since + 1))
        return Moment(number, since / switch.over, begins, text)

    def mix(self, old: Tensor, new: Tensor, weight: float) -> Tensor:
        """The text that lies `weight` of the way from `old` (of the chunk before) to `new`: here a straight line.

        Texts of fewer rows are padded with zeros. A subclass may go another way; the last chunk gets `new` itself.
        """
        old, rows = old.to(new), max(old.shape[1], new.shape[1])
        old, new = (torch.nn.functional.pad(t, (0, 0, 0, rows - t.shape[1])) for t in (old, new))
        return torch.lerp(old, new, weight)

    def text(self, index: int) -> Tensor:
        """Text of a prompt by its number in the stream."""
        index -= self.pruned
        if index < 0:
            raise ValueError(f"prompt {index + self.pruned} is over and was forgotten")
        return self.first if index == 0 else self.switches[index - 1].text

    def prune(self, start: int) -> None:
        """Forget switches that no chunk from the one at `start` on can follow: a stream's bytes stay bounded."""
        while sum(1 for s in self.switches if s.frame <= start) > 2:
            self.first = self.switches.pop(0).text
            self.pruned += 1

    def snapshot(self) -> Snapshot:
        tensors = {"text.0": self.first.detach().clone()}
        tensors.update({f"text.{i + 1}": s.text.detach().clone() for i, s in enumerate(self.switches)})
        facts: dict[str, Any] = {
            "pruned": self.pruned,
            "switches": [{"frame": s.frame, "policy": s.policy, "sink": s.sink, "over": s.over} for s in self.switches],
        }
        return Snapshot(tensors, facts)

    @classmethod
    def restored(cls, snapshot: Snapshot) -> PromptTimeline:
        switches = [
            Switch(text=snapshot.tensors[f"text.{i + 1}"], **fields)
            for i, fields in enumerate(snapshot.facts["switches"])
        ]
        timeline = cls(snapshot.tensors["text.0"], switches)
        timeline.pruned = snapshot.facts["pruned"]
        return timeline
