"""What a chunk may see: pure functions of indices that make the training mask and drive eviction alike.

A `Visibility` answers which *past* latent frames a segment reads; its own frames are implied. Window and sink are
counted in latent frames, the current chunk and the sink included, back from the end of the chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from unspool.annotations import check_word
from unspool.causal.chunks import FrameSet
from unspool.causal.newer import NEWER, brief

Within: TypeAlias = Literal["full", "causal", "own", "none"]
"""What a latent frame reads of its own chunk: all of it, itself and the frames before it, itself, or nothing of it."""

MAIN = "self"
"""The stream (`Site.stream`) that a visibility itself speaks of."""


class Kind(Enum):
    """Why a segment goes through the network."""

    PREFILL = "prefill"  # given latents enter the cache
    DENOISE = "denoise"  # noisy latents, a prediction is wanted
    COMMIT = "commit"  # finished latents, only the K/V are wanted
    RECACHE = "recache"  # kept clean latents again, under another prompt


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive latent frames that go through one forward for one reason.

    `sigma` is the noise level of the segment where that matters to a policy; `read_bank` and `write_bank` name the
    K/V banks (one bank, "clean", unless the policy says otherwise). `limit`: when set, the segment may read only
    past frames of this set (a recache reads what it has already recomputed).
    """

    kind: Kind
    frames: range
    sigma: float = 0.0
    read_bank: str = "clean"
    write_bank: str = "clean"
    limit: FrameSet | None = None

    def __post_init__(self) -> None:
        if len(self.frames) < 1 or self.frames.step != 1 or self.frames.start < 0:
            raise ValueError(f"segment frames {self.frames}: expected a non-empty range of latent frames from 0 up")


Pass = tuple[Segment, ...]  # segments of one forward, in the order in which they may read each other


@runtime_checkable
class Visibility(Protocol):
    """Which past latent frames a segment reads. Once a chunk has dropped a frame no later one may ask for it."""

    @property
    def within(self) -> Within:
        """What a latent frame reads of its own chunk."""
        ...

    def visible(self, segment: Segment) -> FrameSet:
        """Past latent frames (all below `segment.frames.start`) that the segment reads."""
        ...

    def __hash__(self) -> int: ...  # masks are remembered per visibility


@runtime_checkable
class Bounded(Protocol):
    """What a visibility adds when its reach is bounded; without it a cache grows and a stream keeps all clean latents.

    `capacity`: most latent frames that one chunk and all it reads occupy, over all kinds of passes (None: no bound).
    `sink_frames`: first frames that are never dropped; a cache keeps their keys apart where positions move them.
    """

    @property
    def capacity(self) -> int | None: ...

    @property
    def sink_frames(self) -> FrameSet: ...


@runtime_checkable
class WithinBySegment(Protocol):
    """What a visibility adds when passes of different kinds read their own chunk differently."""

    def within_of(self, segment: Segment) -> Within: ...


@runtime_checkable
class Streamed(Protocol):
    """What a visibility adds when one network has attentions that read different frames (`Site.stream`)."""

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams besides `MAIN`."""
        ...

    def stream(self, name: str) -> Visibility: ...


@runtime_checkable
class Padded(Protocol):
    """What a visibility adds when its past always counts as `padded_to` latent frames: where fewer exist, the first is
    read that many times more."""

    @property
    def padded_to(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Full:
    """Every past latent frame (CausVid, ViD-GPT): the cache grows with the stream."""

    within: Within = "full"

    def __post_init__(self) -> None:
        check_word("within", self.within, Within)

    def visible(self, segment: Segment) -> FrameSet:
        return FrameSet.of((0, segment.frames.start))


@dataclass(frozen=True, kw_only=True)
class Window:
    """The first `sink` latent frames and the most recent ones, at most `window` in all (Self-Forcing, LongLive).

    A chunk [s, e) reads the sink and [e - (window - sink), s). `commit_window` gives commit-type passes (PREFILL,
    COMMIT, RECACHE) a reach of their own, and `commit_reads_sink=False` hides the sink from them (Commit Forcing;
    Rolling Forcing). `sink_start` is the first latent frame of the sink: 0 unless a prompt switch replaced it.
    `commit_within` is what commit-type passes read of their own chunk (None: as `within`).
    """

    window: int
    sink: int = 0
    within: Within = "full"
    commit_window: int | None = None
    commit_reads_sink: bool = True
    sink_start: int = 0
    commit_within: Within | None = field(default=None, metadata=NEWER)

    __repr__ = brief

    def __post_init__(self) -> None:
        check_word("within", self.within, Within)
        if self.commit_within is not None:
            check_word("commit_within", self.commit_within, Within)
        if self.sink < 0 or self.window < 1 or self.sink_start < 0:
            raise ValueError(
                f"window={self.window}, sink={self.sink}, sink_start={self.sink_start}: expected window >= 1 and "
                "sink, sink_start >= 0 latent frames"
            )
        for name, value in (("window", self.window), ("commit_window", self.commit_window)):
            if value is not None and value <= self.sink:
                raise ValueError(
                    f"{name}={value} leaves no room beside sink={self.sink}: it counts the sink and the current "
                    f"chunk; use at least {self.sink + 1} (sink + chunk in a rollout)"
                )

    def visible(self, segment: Segment) -> FrameSet:
        start, end = segment.frames.start, segment.frames.stop
        denoise = segment.kind is Kind.DENOISE
        window = self.window if denoise or self.commit_window is None else self.commit_window
        recent = FrameSet.of((max(self.sink_start, end - (window - self.sink)), start))
        if not denoise and not self.commit_reads_sink:
            return recent - self.sink_frames
        return recent | FrameSet.of((self.sink_start, min(self.sink_start + self.sink, start)))

    def within_of(self, segment: Segment) -> Within:
        is_commit = segment.kind is not Kind.DENOISE
        return self.commit_within if is_commit and self.commit_within is not None else self.within

    @property
    def sink_frames(self) -> FrameSet:
        return FrameSet.of((self.sink_start, self.sink_start + self.sink))

    @property
    def capacity(self) -> int:
        """Most latent frames that one chunk and its past occupy."""
        return max(self.window, self.commit_window or 0)


@dataclass(frozen=True, kw_only=True)
class Since:
    """`base` after the stream forgot what lies before `floor`, the frames of `keep` excepted (a cache flush)."""

    base: Visibility
    floor: int
    keep: FrameSet = field(default_factory=FrameSet)

    @property
    def within(self) -> Within:
        return self.base.within

    def within_of(self, segment: Segment) -> Within:
        within = within_of(self.base, segment)
        # A frame whose past was forgotten reads itself: attention over nothing has no value.
        return "own" if within == "none" and not len(self.visible(segment)) else within

    def visible(self, segment: Segment) -> FrameSet:
        reachable = self.keep | FrameSet.of((self.floor, segment.frames.start))
        return self.base.visible(segment) & reachable

    @property
    def capacity(self) -> int | None:
        return capacity_of(self.base)

    @property
    def sink_frames(self) -> FrameSet:
        return sink_of(self.base)

    @property
    def streams(self) -> tuple[str, ...]:
        return streams_of(self.base)

    def stream(self, name: str) -> Visibility:
        return replace(self, base=stream_of(self.base, name))

    @property
    def padded_to(self) -> int:
        return self.base.padded_to if isinstance(self.base, Padded) else 0


VISIBILITIES = {
    "full": "unspool.causal.visibility:Full",
    "window": "unspool.causal.visibility:Window",
    "since": "unspool.causal.visibility:Since",
    "prefix_enhanced": "unspool.causal.prefix:PrefixEnhanced",
}


def within_of(visibility: Visibility, segment: Segment) -> Within:
    """What a latent frame of `segment` reads of its own chunk."""
    return visibility.within_of(segment) if isinstance(visibility, WithinBySegment) else visibility.within


def own_reads(within: Within, count: int) -> list[tuple[range, range]]:
    """Groups of queries among `count` own frames, in order, and the own frames that each group reads."""
    if within == "full":
        return [(range(count), range(count))]
    if within == "none":
        return [(range(count), range(0))]
    return [(range(i, i + 1), range(0 if within == "causal" else i, i + 1)) for i in range(count)]


def first_copies(visibility: Visibility, past: FrameSet) -> int:
    """How many times more than once the first frame of `past` is read."""
    return max(0, visibility.padded_to - len(past)) if isinstance(visibility, Padded) and len(past) else 0


def streams_of(visibility: Visibility) -> tuple[str, ...]:
    """The streams besides `MAIN` of which a visibility speaks."""
    return visibility.streams if isinstance(visibility, Streamed) else ()


def stream_of(visibility: Visibility, name: str) -> Visibility:
    """What the attentions of stream `name` read. Raises ValueError where the visibility does not say."""
    if name == MAIN:
        return visibility
    if not isinstance(visibility, Streamed) or name not in visibility.streams:
        raise ValueError(
            f"attention stream {name!r}: {visibility} speaks of {[MAIN, *streams_of(visibility)]} only; leave "
            f"Site.stream at {MAIN!r} if these attentions read the same frames, else wrap it, for prefix-enhanced "
            "attention as PrefixEnhanced(base=..., frames=...)"
        )
    return visibility.stream(name)


def sink_of(visibility: Visibility) -> FrameSet:
    """The sink frames of a visibility, empty where it has none."""
    return visibility.sink_frames if isinstance(visibility, Bounded) else FrameSet()


def capacity_of(visibility: Visibility) -> int | None:
    """Latent frames that a bounded visibility needs at once; None where there is no bound."""
    return visibility.capacity if isinstance(visibility, Bounded) else None


def outlived(visibility: Visibility, now: int) -> Visibility:
    """The base of a `Since` once no pass or recache from latent frame `now` on can reach what was forgotten."""
    if not isinstance(visibility, Since):
        return visibility
    capacity, sink = capacity_of(visibility.base), sink_of(visibility.base)
    out_of_reach = capacity is not None and now - capacity >= visibility.floor
    return visibility.base if out_of_reach and sink <= visibility.keep else visibility


def retained(visibility: Visibility, segment: Segment) -> FrameSet:
    """Past frames that the chunk of `segment` needs in any of its passes: all the others can be dropped."""
    kinds = (Kind.DENOISE, Kind.COMMIT)
    needed = FrameSet()
    for kind in kinds:
        needed = needed | visibility.visible(replace(segment, kind=kind))
    return needed


def check_window(visibility: Visibility, longest_chunk: int) -> None:
    """Raise ValueError when a chunk of `longest_chunk` latent frames does not fit beside the sink."""
    base = visibility
    while isinstance(getattr(base, "base", None), Visibility):  # what wraps a window is refused in the window's words
        base = base.base  # type: ignore[attr-defined]
    sink = len(sink_of(base))
    reaches = {"capacity": capacity_of(base)}
    if isinstance(base, Window):
        reaches = {"window": base.window, "commit_window": base.commit_window}
    for name, value in reaches.items():
        if value is not None and longest_chunk > value - sink:
            raise ValueError(
                f"a chunk of {longest_chunk} latent frames is longer than {name}={value} minus sink={sink}; use "
                f"{name} >= {longest_chunk + sink} or a shorter chunk"
            )
