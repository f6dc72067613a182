"""The exact scorer of the Sprite Stage: what uint8 frames show, from the pixels alone, and whether it was asked for.

Analysis by synthesis: the sky, then blobs of one colour, then shape and place of each blob by drawing it, then tracks
and their motions. Everything seen is drawn again; the PSNR of the frames against that drawing (manifold PSNR) is a
quality that needs no reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from unspool.data.worlds.captions import Caption
from unspool.data.worlds.fitting import Seen, look
from unspool.data.worlds.stage import Prompt
from unspool.data.worlds.tracking import Track, follow, sliding, split

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

ATTRIBUTES = ("colour", "shape", "motion", "size")
RIGHT = 0.8
"""Share of frames (or windows) from which an attribute of a clip is right."""
PERMANENT = 0.95
"""Share of frames from which a sprite is permanent."""
HOLD_S = 0.25
"""Seconds for which a new attribute must hold to count as reached."""


@dataclass(frozen=True, kw_only=True)
class Settle:
    """Seconds after a prompt change in which an attribute is not judged: the stage's own transition and some frames."""

    presence: float = 0.4
    shape: float = 0.35
    motion: float = 0.6
    size: float = 0.4
    sky: float = 0.6

    @classmethod
    def after(cls, delay_s: float) -> Settle:
        """The same with `delay_s` more for each: a model that reacts at the next chunk boundary."""
        return cls(**{name: value + delay_s for name, value in asdict(cls()).items()})


@dataclass(frozen=True)
class Analysis:
    """Everything that is seen in `frames` frames: skies and fits of each, tracks, and per frame the number of sprites
    beside the tracks (`spare`: of a colour that has one already; `seen.strange`: of no colour or shape)."""

    frames: int
    fps: float
    seen: Seen
    tracks: tuple[Track, ...]
    spare: Ints


@dataclass(frozen=True)
class ClipScore:
    """How a clip (or a span of it) follows its prompts. Shares in [0, 1]; NaN where nothing could be judged.

    `presence`: an object stands for the prompted sprite; `colour`, `shape`, `motion`, `size`: it has the stated
    attribute (a missing one has none); `sky`; `adherence`: mean over attributes and sprites, the sky as one more;
    `strict`: 1 if all of them are right; `permanence`: share of prompted sprites that stay what they are;
    `extra`, `missing`: objects per frame that no prompt explains, or that are asked for in vain; `psnr`,
    `foreground_psnr` (dB) against the best re-rendering; `jerk` stage heights per frame cubed; `speed` mean speed in
    stage heights per second; `sprites`: the shares of each prompted sprite of each prompt.
    """

    presence: float
    colour: float
    shape: float
    motion: float
    size: float
    sky: float
    adherence: float
    strict: float
    permanence: float
    extra: float
    missing: float
    psnr: float
    foreground_psnr: float
    jerk: float
    speed: float
    sprites: tuple[dict[str, float], ...] = field(default=(), repr=False)


SCORES = tuple(name for name in ClipScore.__dataclass_fields__ if name != "sprites")


def analyse(frames: NDArray[np.uint8], fps: float) -> Analysis:
    """See everything in uint8 frames [f, h, w, 3]. Raises ValueError for anything else, or fewer than four frames."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or len(frames) < 4:
        raise ValueError(f"frames {frames.dtype} {frames.shape}: expected uint8 [f, h, w, 3] with at least 4 frames")
    if min(frames.shape[1:3]) < 24 or fps <= 0:
        raise ValueError(f"frames of {frames.shape[1:3]} at fps={fps}: expected at least 24 pixels and a positive rate")
    seen = look(frames)
    tracks, spare = follow(seen.sprites, len(frames))
    return Analysis(len(frames), fps, seen, tuple(tracks), spare)


def score_clip(
    frames: NDArray[np.uint8], fps: float, prompts: Sequence[Prompt], *, settle: Settle | None = None
) -> ClipScore:
    """Score uint8 frames [f, h, w, 3] against what is wanted from which time on (`Scene.prompts`)."""
    return score(analyse(frames, fps), prompts, settle=settle)


def score(
    analysis: Analysis, prompts: Sequence[Prompt], *, span: tuple[int, int] | None = None, settle: Settle | None = None
) -> ClipScore:
    """The score of the frames `span` (first, end; all when None): drift is the score of one span after another.

    Raises ValueError without a prompt, with prompts out of order, or for an empty span.
    """
    times = [p.time for p in prompts]
    first, end = span or (0, analysis.frames)
    if not prompts or sorted(times) != times or not 0 <= first < end <= analysis.frames:
        raise ValueError(f"prompts at {times}, span {span} of {analysis.frames} frames: expected times in order")
    settle = settle or Settle()
    rows: list[dict[str, float]] = []
    skies, others, weights = [], [], []
    for k, prompt in enumerate(prompts):
        start = max(first, _frame(prompt.time, analysis.fps) if k else 0)
        stop = min(end, _frame(prompts[k + 1].time, analysis.fps) if k + 1 < len(prompts) else end)
        if start >= stop:
            continue
        part = _Part(analysis, prompt.caption, start, stop, prompt.time if k else None, settle)
        rows += part.sprites
        skies.append(part.sky)
        others.append((part.extra, part.missing))
        weights.append(stop - start)
    return _summary(analysis, slice(first, end), rows, skies, others, weights)


def attributes_over_time(frames: NDArray[np.uint8], fps: float) -> list[dict[str, object]]:
    """What is seen frame by frame: {"sky": name index or -1, "sprites": [{colour, shape, motion, size, x, y}]}; the
    motion is that of the 0.75 s around the frame, -1 where it is none."""
    analysis = analyse(frames, fps)
    windows, nearest = sliding(analysis.frames, fps)
    labels = [track.motions(windows, fps)[1][nearest] for track in analysis.tracks]
    out: list[dict[str, object]] = []
    for f in range(analysis.frames):
        sprites = [
            {
                "colour": track.colour, "shape": int(track.shape[f]), "motion": int(label[f]),
                "size": int(track.size[f]), "x": float(track.x[f]), "y": float(track.y[f]),
            }
            for track, label in zip(analysis.tracks, labels, strict=True) if track.seen[f]
        ]  # fmt: skip
        out.append({"sky": int(analysis.seen.skies.sky[f]), "sprites": sprites})
    return out


def agreement(analysis: Analysis, caption: Caption) -> dict[str, Bools]:
    """Per frame, whether it shows what `caption` states: "sky", "colour", "shape", "motion", "size" of all its sprites
    (found by their colour), "alone" (nothing else is there), and "all" of it."""
    windows, nearest = sliding(analysis.frames, analysis.fps)
    by_colour = {track.colour: track for track in analysis.tracks}
    good = {name: np.ones(analysis.frames, bool) for name in ("sky", *ATTRIBUTES, "alone")}
    if caption.sky >= 0:
        good["sky"] = analysis.seen.skies.sky == caption.sky
    count = analysis.spare + sum((t.seen for t in analysis.tracks), np.zeros(analysis.frames, np.int64))
    good["alone"] = count + analysis.seen.strange <= len(caption.sprites)
    for colour, shape, motion, size in caption.sprites:
        track = by_colour.get(colour)
        if track is None:
            for name in ATTRIBUTES:
                good[name][:] = False
            continue
        there = track.seen | track.hidden
        fits = track.motions(windows, analysis.fps)[0][nearest, motion]
        good["colour"] &= there
        good["shape"] &= track.hidden | (track.seen & ((track.shape == shape) | (shape < 0)))
        good["size"] &= track.hidden | (track.seen & ((track.size == size) | (size < 0)))
        good["motion"] &= there & (fits | (motion < 0))
    good["all"] = np.logical_and.reduce(list(good.values()))
    return good


def first_held(good: Bools, fps: float, *, start_s: float = 0.0, hold_s: float = HOLD_S) -> float:
    """Seconds from `start_s` until `good` [f] holds for `hold_s`; infinity if it never does."""
    start, need = _frame(start_s, fps), max(1, round(hold_s * fps))
    if len(good) - start < need:
        return float("inf")
    found = np.flatnonzero(np.convolve(good[start:].astype(int), np.ones(need, int), "valid") == need)
    return (start + float(found[0])) / fps - start_s if len(found) else float("inf")


class _Part:
    """The frames of one prompt, and how each of its sprites does."""

    def __init__(
        self, analysis: Analysis, caption: Caption, start: int, stop: int, since: float | None, settle: Settle
    ) -> None:
        self.analysis, self.caption, self.stop = analysis, caption, stop
        self.begin = {
            name: start if since is None else max(start, _frame(since + seconds, analysis.fps))
            for name, seconds in asdict(settle).items()
        }
        self.sky = self._sky()
        self.windows = split(self.begin["motion"], stop, analysis.fps)
        self.fits = [track.motions(self.windows, analysis.fps)[0] for track in analysis.tracks]
        table = [[self._row(wanted, k) for k in range(len(analysis.tracks))] for wanted in caption.sprites]
        chosen = _assign(table, caption.sprites, [track.colour for track in analysis.tracks])
        self.sprites = [table[i][k] if k is not None else self._absent(i) for i, k in enumerate(chosen)]
        for row in self.sprites:
            row["frames"] = stop - start
        self.extra, self.missing = self._others([k for k in chosen if k is not None])

    def _judged(self, name: str) -> slice:
        return slice(self.begin[name], self.stop)

    def _sky(self) -> float:
        if self.caption.sky < 0:
            return float("nan")
        return _share(self.analysis.seen.skies.sky[self._judged("sky")] == self.caption.sky)

    def _row(self, wanted: tuple[int, int, int, int], k: int) -> dict[str, float]:
        """Shares for a track that stands for the sprite `wanted`."""
        track, frames = self.analysis.tracks[k], self._judged("presence")
        colour, shape, motion, size = wanted
        there = (track.seen | track.hidden)[frames]
        row = {"presence": _share(there)}
        row["colour"] = float("nan") if colour < 0 else _share(there & (track.colour == colour))
        for name, value, shown in (("shape", shape, track.shape), ("size", size, track.size)):
            part = self._judged(name)
            judged = ~track.hidden[part]
            if judged.sum() < 0.1 * len(judged):
                judged = track.seen[part] | ~judged
            row[name] = float("nan") if value < 0 else _share((shown[part] == value)[judged])
        fits = self.fits[k]
        row["motion"] = float("nan") if motion < 0 or not len(fits) else float(fits[:, motion].mean())
        row["permanence"] = self._permanence(track)
        return row

    def _permanence(self, track: Track) -> float:
        part = self._judged("presence")
        seen, shape, hidden = track.seen[part], track.shape[part], track.hidden[part]
        if not seen.any():
            return 0.0
        since = int(seen.argmax())
        clear = ~hidden[since:]
        if not clear.any():
            return 1.0
        shown = shape[since:][clear & seen[since:]]
        usual = np.bincount(shown[shown >= 0]).argmax() if (shown >= 0).any() else -1
        return float(((shape[since:] == usual) & seen[since:])[clear].mean() >= PERMANENT)

    def _absent(self, index: int) -> dict[str, float]:
        stated = dict(zip(ATTRIBUTES, self.caption.sprites[index], strict=True))
        row = {name: float("nan") if stated[name] < 0 else 0.0 for name in ATTRIBUTES}
        if not self.windows:
            row["motion"] = float("nan")
        return {"presence": 0.0, **row, "permanence": 0.0}

    def _others(self, chosen: list[int]) -> tuple[float, float]:
        """Objects per frame beside the chosen tracks, and of the prompted ones not there."""
        part, analysis = self._judged("presence"), self.analysis
        if part.start >= part.stop:
            return float("nan"), float("nan")
        extra = (analysis.spare + analysis.seen.strange)[part].astype(float)
        missing = np.full(part.stop - part.start, float(len(self.caption.sprites)))
        for k, track in enumerate(analysis.tracks):
            if k in chosen:
                missing -= (track.seen | track.hidden)[part]
            else:
                extra += track.seen[part]
        return float(extra.mean()), float(missing.mean())


def _assign(
    table: list[list[dict[str, float]]], sprites: Sequence[tuple[int, int, int, int]], colours: list[int]
) -> list[int | None]:
    """Which track stands for which sprite: that of its colour, or else one that is right in shape and in motion."""

    def value(i: int, k: int | None) -> float:
        if k is None:
            return 0.0
        row, is_colour = table[i][k], sprites[i][0] in (colours[k], -1)
        if not row["presence"] > 0 or not (is_colour or min(_known(row["shape"]), _known(row["motion"])) > 0.5):
            return -1.0
        return 4.0 * is_colour + _known(row["presence"]) + _known(row["shape"]) + _known(row["motion"])

    useful = [k for k in range(len(colours)) if any(value(i, k) > 0 for i in range(len(sprites)))]
    choices = [*useful, *[None] * len(sprites)]
    best: tuple[float, tuple[int | None, ...]] = (-1.0, (None,) * len(sprites))
    for pick in set(permutations(choices, len(sprites))):
        values = [value(i, k) for i, k in enumerate(pick)]
        if min(values, default=0.0) >= 0 and sum(values) > best[0]:
            best = (sum(values), pick)
    return list(best[1])


def _summary(
    analysis: Analysis,
    frames: slice,
    rows: list[dict[str, float]],
    skies: list[float],
    others: list[tuple[float, float]],
    weights: list[int],
) -> ClipScore:
    def over(name: str) -> float:
        return _weighted([row[name] for row in rows], [row["frames"] for row in rows])

    shares = [(row[name], row["frames"]) for row in rows for name in ATTRIBUTES]
    shares += list(zip(skies, weights, strict=True))
    judged = [value for value, _ in shares if np.isfinite(value)]
    tracks, span = analysis.tracks, frames.stop - frames.start
    long = [t for t in tracks if t.seen[frames].mean() >= min(0.2, 8 / span)]
    foreground = analysis.seen.foreground_psnr[frames]
    return ClipScore(
        presence=over("presence"), colour=over("colour"), shape=over("shape"), motion=over("motion"),
        size=over("size"), sky=_weighted(skies, weights),
        adherence=_weighted([v for v, _ in shares], [w for _, w in shares]),
        strict=float(min(judged) >= RIGHT) if judged else float("nan"),
        permanence=over("permanence"),
        extra=_weighted([e for e, _ in others], weights), missing=_weighted([m for _, m in others], weights),
        psnr=float(analysis.seen.psnr[frames].mean()),
        foreground_psnr=float(np.nanmean(foreground)) if np.isfinite(foreground).any() else float("nan"),
        jerk=_weighted([t.jerk(frames) for t in long], [1] * len(long)),
        speed=_weighted([t.speed(analysis.fps, frames) for t in long], [1] * len(long)),
        sprites=tuple(rows),
    )  # fmt: skip


def _frame(time: float, fps: float) -> int:
    """The first frame at or after `time`."""
    return max(0, int(np.ceil(time * fps - 1e-6)))


def _share(good: Bools) -> float:
    return float(good.mean()) if len(good) else float("nan")


def _known(value: float) -> float:
    return value if np.isfinite(value) else 1.0


def _weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    """Mean of what is not NaN."""
    pairs = [(v, w) for v, w in zip(values, weights, strict=True) if np.isfinite(v)]
    total = sum(w for _, w in pairs)
    return float(sum(v * w for v, w in pairs) / total) if total else float("nan")
