"""Exponential moving average of a role's weights, in fp32, sharded as the weights are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unspool.train.config import EmaConfig
from unspool.train.parallel import local


def ema_decay(config: EmaConfig, update: int) -> float:
    """Decay at the 0-based `update`: 0 before `start`, then min(decay, (1 + update) / (warmup + update)), or decay
    without warm-up."""
    if update < config.start:
        return 0.0
    return min(config.decay, (1 + update) / (config.warmup + update)) if config.warmup else config.decay


class Ema:
    """ema <- d ema + (1 - d) weights, from the weights it is made with. `average` by parameter name."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: EmaConfig) -> None:
        self.config = config
        self._parameters = dict(parameters)
        self.average: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def reset(self) -> None:
        """Begin again at the present weights."""
        for name, parameter in self._parameters.items():
            local(self.average[name]).copy_(local(parameter))

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Take in the weights after optimizer step `number`, counted from 0."""
        averages = [local(average) for average in self.average.values()]
        weights = [local(parameter) for parameter in self._parameters.values()]
        torch._foreach_lerp_(averages, weights, 1.0 - ema_decay(self.config, number))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The module computes with the average inside; its own weights are back afterwards, to the bit."""
        kept = {name: local(p).detach().clone() for name, p in self._parameters.items()}
        self._put({name: local(average) for name, average in self.average.items()})
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            local(self._parameters[name]).copy_(value)
