"""Layers of TAEHV over frames laid out time-major, (f b) c h w in channels-last memory.

Channels-last is the fast memory layout of convolutions on a CPU and in half precision on a GPU, and with time outermost
the frames before are a shift by `b` rows. Slices and joins are made with the channels moved to the end, because their
gradients are laid out in the order of the axes.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


class Clamp(nn.Module):
    """Latents squeezed into (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """relu(x + convolutions of [x, x one frame earlier]); before the first frame there are zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            conv(2 * width, width), nn.ReLU(inplace=True), conv(width, width), nn.ReLU(inplace=True), conv(width, width)
        )

    @property
    def last(self) -> nn.Conv2d:
        """The convolution whose output is added to x."""
        layer = self.conv[-1]
        assert isinstance(layer, nn.Conv2d)
        return layer

    def forward(self, x: Tensor, earlier: Tensor) -> Tensor:
        """x (f b) c h w; `earlier` [b, c, h, w] is the frame before x."""
        frames = x.movedim(1, -1)
        past = torch.cat([earlier.movedim(1, -1), frames[: -len(earlier)]])
        return F.relu_(self.conv(torch.cat([frames, past], dim=-1).movedim(-1, 1)).add_(x))


class Pool(nn.Module):
    """1x1 convolution of `stride` consecutive frames, stacked on channels with the oldest first, into one."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width * stride, width, 1, bias=False)

    def forward(self, x: Tensor, batch: int) -> Tensor:
        if self.stride > 1:
            x = rearrange(x.movedim(1, -1), "(f s b) h w c -> (f b) h w (s c)", s=self.stride, b=batch).movedim(-1, 1)
        return self.conv(x)


class Grow(nn.Module):
    """1x1 convolution to `stride` frames per frame, the oldest in the first rows, then nearest x2 in space.

    The published layout enlarges first. Both commute, and this way round costs a quarter.
    """

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor, batch: int) -> Tensor:
        x = self.conv(x)
        if self.stride > 1:
            x = rearrange(x.movedim(1, -1), "(f b) h w (s c) -> (f s b) h w c", s=self.stride, b=batch).movedim(-1, 1)
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Stack(nn.ModuleList):
    """The layers of one half, under the numbers of the published files; the state goes in and comes out."""

    compiled_methods = ("one",)

    def forward(self, x: Tensor, batch: int, memory: tuple[Tensor, ...] | None, *, keep: bool = True) -> tuple[
        Tensor, tuple[Tensor, ...]
    ]:  # fmt: skip
        """x (f b) c h w of whole groups of frames -> the same layout, and with `keep` what the next call needs.

        `memory`: the last input frame [b, c, h, w] of every memory block; None where x begins.
        """
        if keep and len(x) == batch:
            return self.one(x, self.nothing_before(x) if memory is None else memory)
        return self.run(x, batch, memory, keep=keep)

    def one(self, x: Tensor, memory: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`run` of a single frame, as streams decode: a method of its own, so that a compiler sees one shape only."""
        return self.run(x, len(x), memory, keep=True)

    def run(self, x: Tensor, batch: int, memory: tuple[Tensor, ...] | None, *, keep: bool) -> tuple[
        Tensor, tuple[Tensor, ...]
    ]:  # fmt: skip
        """`forward`, of any number of frames."""
        earlier = None if memory is None else iter(memory)
        kept: list[Tensor] = []
        for layer in self:
            if isinstance(layer, MemoryBlock):
                before = torch.zeros_like(x[:batch]) if earlier is None else next(earlier)
                if keep:
                    # a view would keep all of x alive; the layout is said, or a compiler chooses one that differs
                    kept.append(x[-batch:].clone(memory_format=torch.channels_last))
                x = layer(x, before)
            elif isinstance(layer, Pool | Grow):
                x = layer(x, batch)
            else:
                x = layer(x)
        return x, tuple(kept)

    def nothing_before(self, x: Tensor) -> tuple[Tensor, ...]:
        """The memory of where frames x [b, c, h, w] begin, zeros: given, the first frame needs no shape of its own."""
        height, width = x.shape[-2:]
        zeros = []
        for layer in self:
            if isinstance(layer, MemoryBlock):
                size = (len(x), layer.last.out_channels, height, width)
                zeros.append(x.new_zeros(size).contiguous(memory_format=torch.channels_last))
            elif isinstance(layer, Grow):
                height, width = 2 * height, 2 * width
            elif isinstance(layer, nn.Conv2d) and layer.stride[0] > 1:
                height, width = -(-height // layer.stride[0]), -(-width // layer.stride[0])
        return tuple(zeros)


def conv(inside: int, outside: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """3x3 convolution that keeps the size, or halves it with stride 2."""
    return nn.Conv2d(inside, outside, 3, padding=1, stride=stride, bias=bias)


def encoder(widths: tuple[int, ...], channels: int, num_blocks: int, pooling: tuple[int, ...]) -> Stack:
    """Pixels in [0, 1] -> latents."""
    layers: list[nn.Module] = [conv(3, widths[0]), nn.ReLU(inplace=True)]
    for inside, outside, stride in zip(widths[:-1], widths[1:], pooling, strict=True):
        layers += [Pool(inside, stride), conv(inside, outside, stride=2, bias=False)]
        layers += [MemoryBlock(outside) for _ in range(num_blocks)]
    return Stack([*layers, conv(widths[-1], channels)])


def decoder(widths: tuple[int, ...], channels: int, num_blocks: int, growth: tuple[int, ...]) -> Stack:
    """Latents -> pixels about [0, 1], neither clamped nor cut."""
    layers: list[nn.Module] = [Clamp(), conv(channels, widths[0]), nn.ReLU(inplace=True)]
    for inside, outside, stride in zip(widths[:-1], widths[1:], growth, strict=True):
        layers += [MemoryBlock(inside) for _ in range(num_blocks)]
        layers += [nn.Identity(), Grow(inside, stride), conv(inside, outside, bias=False)]  # enlarging, see Grow
    return Stack([*layers, nn.ReLU(inplace=True), conv(widths[-1], 3)])


def initialise(encoder: Stack, decoder: Stack) -> None:
    """Random weights to train from: every memory block begins as the identity, the first picture is grey.

    Convolutions before a ReLU or a memory block get gain sqrt(2), the 1x1 ones and the last of each half gain 1.
    """
    for stack in (encoder, decoder):
        for layer in stack.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if layer.kernel_size == (1, 1) else "relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
    for stack in (encoder, decoder):
        for layer in stack:
            if isinstance(layer, MemoryBlock):
                nn.init.zeros_(layer.last.weight)
        last = stack[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        nn.init.xavier_normal_(last.weight)
        nn.init.constant_(last.bias, 0.0 if stack is encoder else 0.5)
