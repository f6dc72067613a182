"""How a model is rolled out, as plain data: what `model.json` states, options change and a video's record keeps."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from unspool.annotations import check_word
from unspool.causal.chunks import check_prefix
from unspool.causal.newer import NEWER
from unspool.config import locate

if TYPE_CHECKING:
    from unspool.causal.visibility import Visibility
    from unspool.diffusion.process import Process
    from unspool.rollout.settings import RolloutConfig

Window = int | Literal["full"]
Within = Literal["full", "causal", "own", "none"]
Commit = Literal["separate", "fused", "none", "recompute"]
SwitchPolicy = Literal["keep", "recache", "recache_bidirectional", "flush"]
SinkPolicy = Literal["kept", "replaced", "recomputed"]

GUIDANCE_CONVENTION = "uncond + scale * (cond - uncond); 1 is no guidance"
"""What every guidance scale of this library means; written into model files so that no reader has to guess."""


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """All that decides a rollout besides network, prompts and noise; see `RolloutConfig`, which it becomes.

    Fields: `chunk`, `first` latent frames per chunk and in chunk 0; `window` latent frames a chunk may read ("full":
    all), `sink` of them always the first; `within` what a frame reads of its own chunk, `commit_within` what it reads
    in commit passes (None: the same); `positions` a name of POSITIONS with its `position_options`; `sigmas` of the
    schedule, `conditioning` what the network is told instead of them, `first_sigmas` of chunk 0; `shift` that makes
    schedules of another length (None: the steps are fixed, as in a distilled model, whose `other_sigmas` are further
    schedules that it can be run with); `solver` a name of SOLVERS; `switch_policy`, `sink_policy` what a prompt switch
    does by default; `process` a name of PROCESSES with its `process_options`, under "iddpm" any number of steps can be
    asked for; `prefix_frames` latent frames that prefix-enhanced attentions read (None: the network has none);
    `commit`, `commit_noise` as of `RolloutConfig`; `bidirectional_past`: under the commit "recompute" all latent frames
    of a forward read each other, clean ones the noisy ones too (False: as `within` says). `solver`, `positions` and
    `process` may also be your own "module:Class", made with the options beside them (`solver_options`). `visibility`,
    one of VISIBILITIES or such a class, decides with its `visibility_options` what chunks read, instead of `window`,
    `sink` and `within`.

    Raises ValueError for a word that is not of its list or a number that is none, for a chunk shorter than
    `prefix_frames`, for `bidirectional_past` with a cache, and for another convention of guidance.
    """

    chunk: int
    window: Window
    sink: int
    sigmas: tuple[float, ...]
    solver: str
    shift: float | None
    guidance_scale: float
    sigma_commit: float
    switch_policy: SwitchPolicy
    sink_policy: SinkPolicy = "kept"
    first: int | None = None
    within: Within = "full"
    positions: str = "absolute"
    position_options: dict[str, int] = field(default_factory=dict)
    conditioning: tuple[float, ...] | None = None
    first_sigmas: tuple[float, ...] | None = None
    other_sigmas: tuple[tuple[float, ...], ...] = ()
    guidance_mode: Literal["batch", "two_caches"] = "batch"
    guidance_convention: str = GUIDANCE_CONVENTION
    commit: Commit = "separate"
    process: str = field(default="flow", metadata=NEWER)
    process_options: dict[str, str | int | float] = field(default_factory=dict, metadata=NEWER)
    prefix_frames: int | None = field(default=None, metadata=NEWER)
    commit_noise: float = field(default=0.0, metadata=NEWER)
    bidirectional_past: bool = field(default=False, metadata=NEWER)
    commit_within: Within | None = field(default=None, metadata=NEWER)
    solver_options: dict[str, str | int | float] = field(default_factory=dict, metadata=NEWER)
    visibility: str | None = field(default=None, metadata=NEWER)
    visibility_options: dict[str, str | int | float] = field(default_factory=dict, metadata=NEWER)

    def __post_init__(self) -> None:
        self._check_values()
        if self.guidance_convention != GUIDANCE_CONVENTION:
            raise ValueError(
                f"guidance_convention={self.guidance_convention!r}: expected {GUIDANCE_CONVENTION!r}; convert the scale"
            )
        check_prefix(self.chunk, self.prefix_frames)
        if self.commit_within is not None and self.window == "full":
            raise ValueError(
                f"commit_within={self.commit_within!r} with window='full': expected a window in latent frames, which "
                "alone reads its own chunk differently in commit passes"
            )
        if self.visibility_options and self.visibility is None:
            raise ValueError(
                f"visibility_options={self.visibility_options} without visibility: expected a name or your own "
                "'module:Class' for it; else use window, sink and within"
            )
        if self.bidirectional_past and self.commit != "recompute":
            raise ValueError(
                f"bidirectional_past=True with commit={self.commit!r}: expected commit='recompute'; keys that a cache "
                "kept have not read the noisy frames"
            )

    def _check_values(self) -> None:
        """Words of their lists, and plain numbers: numpy's are taken, and a record of them can be read again."""
        for name, kind in (
            ("within", Within), ("commit", Commit), ("switch_policy", SwitchPolicy), ("sink_policy", SinkPolicy),
        ):  # fmt: skip
            check_word(name, getattr(self, name), kind)
        for name in ("chunk", "window", "sink", "first", "prefix_frames"):
            value = getattr(self, name)
            if value is None or (name == "window" and value == "full"):
                continue
            try:
                object.__setattr__(self, name, operator.index(value))
            except TypeError:
                words = " or 'full'" if name == "window" else ""
                raise ValueError(f"{name}={value!r}: expected a whole number of latent frames{words}") from None
        for name in ("guidance_scale", "sigma_commit", "commit_noise"):
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def cache(self) -> str:
        """The name of the cache that the network's attentions need."""
        if self.commit == "recompute":
            return "recompute_bidirectional" if self.bidirectional_past else "recompute"
        return "kv" if self.prefix_frames is None else "streams"

    @property
    def steps(self) -> int:
        """Denoising steps per chunk."""
        return len(self.sigmas) - 1

    def changed(
        self,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        window: Window | None = None,
        sink: int | None = None,
        switch_policy: SwitchPolicy | None = None,
    ) -> RolloutSettings:
        """A copy with what a caller asks for; None leaves a setting as it is.

        Raises ValueError for a number of steps that the model cannot be run with.
        """
        if self.visibility is not None and not window is sink is None:
            raise ValueError(
                f"window={window}, sink={sink}: what this model reads is decided by visibility={self.visibility!r}; "
                "leave them out, or change its visibility_options"
            )
        changes: dict[str, Any] = {
            "guidance_scale": guidance,
            "window": window,
            "sink": sink,
            "switch_policy": switch_policy,
        }
        changed = replace(self, **{name: value for name, value in changes.items() if value is not None})
        return changed if steps is None or steps == self.steps else changed._with_steps(steps)

    def _with_steps(self, steps: int) -> RolloutSettings:
        from unspool.diffusion.iddpm import IDDPM
        from unspool.diffusion.schedule import uniform

        process = self.noising()
        if isinstance(process, IDDPM):
            return replace(self, sigmas=process.schedule(steps).sigmas, conditioning=None, first_sigmas=None)
        if self.shift is None:
            known = {len(sigmas) - 1: sigmas for sigmas in self.other_sigmas}
            if steps in known:
                return replace(self, sigmas=known[steps], conditioning=None, first_sigmas=None)
            have = " or ".join(map(str, sorted({self.steps, *known})))
            raise ValueError(
                f"steps={steps}: this model was distilled to {have} fixed steps; leave steps out or use {have}"
            )
        return replace(self, sigmas=uniform(steps, shift=self.shift).sigmas, conditioning=None, first_sigmas=None)

    def noising(self) -> Process:
        """The process that `process` and its options name. Raises ValueError for options that it does not have."""
        from unspool.diffusion import PROCESSES

        made: Process = _made("process", self.process, PROCESSES, self.process_options)
        return made

    def config(self, *, whole: int | None = None) -> RolloutConfig:
        """The configuration of an endless stream, or of one clip of `whole` latent frames that is made at once.

        Raises ValueError for settings that do not fit together.
        """
        from unspool.causal.chunks import ChunkPlan
        from unspool.causal.position import POSITIONS
        from unspool.causal.prefix import PrefixEnhanced
        from unspool.causal.visibility import VISIBILITIES, Full
        from unspool.causal.visibility import Window as Windowed
        from unspool.diffusion.schedule import Schedule
        from unspool.rollout.guidance import Guidance
        from unspool.rollout.settings import RolloutConfig
        from unspool.rollout.solvers import SOLVERS

        plan = ChunkPlan(chunk=self.chunk, first=self.first)
        windowed = self.window != "full" and whole is None
        if whole is not None:
            plan = ChunkPlan(chunk=whole, num_frames=whole)
        visibility: Visibility = Full(within=self.within)
        if whole is None and self.visibility is not None:
            visibility = _made("visibility", self.visibility, VISIBILITIES, self.visibility_options)
        elif windowed:
            visibility = Windowed(
                window=int(self.window), sink=self.sink, within=self.within, commit_within=self.commit_within
            )
        if self.prefix_frames is not None:
            visibility = PrefixEnhanced(base=visibility, frames=self.prefix_frames)
        process = self.noising()
        solver: Any = _made("solver", self.solver, SOLVERS, self.solver_options)
        own = {f.name for f in fields(solver)} if is_dataclass(solver) else set()
        if "process" in own:  # it uses the tables: "ancestral"
            if not isinstance(process, getattr(solver, "made_for", object)):
                raise ValueError(
                    f"solver={self.solver!r} with process={self.process!r}: it is made for {solver.made_for.__name__}; "
                    "set the process, or use another solver"
                )
            solver = replace(solver, process=process)
        return RolloutConfig(
            plan=plan,
            schedule=Schedule(self.sigmas, self.conditioning),
            first_schedule=None if self.first_sigmas is None else Schedule(self.first_sigmas),
            visibility=visibility,
            process=process,
            commit_noise=0.0 if whole is not None else self.commit_noise,
            positions=_made("position", self.positions, POSITIONS, self.position_options),
            solver=solver,
            guidance=Guidance(self.guidance_scale, self.guidance_mode),
            sigma_commit=self.sigma_commit,
            commit="none" if whole is not None else self.commit,
        )


def plain(value: int) -> int:
    """An integer of numpy as one of Python, which a record can hold; anything else as it is."""
    return operator.index(value) if hasattr(value, "dtype") and hasattr(value, "__index__") else value


def _made(kind: str, name: str, table: Mapping[str, str], options: Mapping[str, object]) -> Any:
    """An object of the class that `name` stands for. Raises ValueError for options that it does not have."""
    named = locate(name, table)
    try:
        return named(**options)
    except TypeError as error:
        known = ", ".join(f.name for f in fields(named)) if is_dataclass(named) else "those of its constructor"
        raise ValueError(f"{name!r} with {kind}_options={dict(options)}: expected options among {known}") from error
