"""Ways of extending a video with one network, as configurations of the one rollout, and the bytes of their caches.

What is compared in arXiv:2411.16375 (tables 5 and 6): a shared bounded cache (Ca2-VDM), a fixed or a growing past that
every forward computes again (OS-Fix, OS-Ext), and one cache per denoising step (Live2Diff).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from unspool.causal.cache import CACHES
from unspool.causal.chunks import ChunkPlan
from unspool.causal.position import Cyclic, PositionPolicy, WindowRelative
from unspool.causal.prefix import PrefixEnhanced
from unspool.causal.visibility import Full, Kind, Segment, Visibility, Window, capacity_of
from unspool.config import locate
from unspool.diffusion.iddpm import IDDPM
from unspool.models.stdit.config import STDiTConfig
from unspool.models.stdit.network import STDiT
from unspool.rollout.rollout import RolloutConfig
from unspool.rollout.solvers.ancestral import Ancestral


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way: `config` and `cache` of a rollout, and how many latent frames are `given` to it."""

    config: RolloutConfig
    cache: str
    given: int


@dataclass(frozen=True, kw_only=True)
class ExtensionConfig:
    """What all ways share.

    Fields: `chunk` (l) latent frames denoised together, `num_chunks` of them; `pmax` clean latent frames read at most;
    `steps` of ancestral sampling; `prefix_frames` (P') of prefix-enhanced attention, None for a network without;
    `unbounded`: OS-Ext's past grows without a bound, instead of to `pmax`; `process` as the network's.
    Raises ValueError for a past that holds no chunk.
    """

    chunk: int = 8
    pmax: int = 25
    num_chunks: int = 10
    steps: int = 100
    prefix_frames: int | None = None
    unbounded: bool = False
    process: IDDPM = field(default_factory=IDDPM)

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.pmax < self.chunk or self.num_chunks < 1:
            raise ValueError(
                f"chunk={self.chunk}, pmax={self.pmax}, num_chunks={self.num_chunks}: expected at least one latent "
                "frame and one chunk, and a past of at least a chunk; the paper has 8, 25 and 10"
            )


def ways(shared: ExtensionConfig) -> dict[str, Way]:
    """Name -> way: "ca2vdm", "os_fix", "os_ext", "step_caches"."""
    window = Window(window=shared.pmax + shared.chunk, within="causal", commit_within="causal")
    causal = _with_prefix(window, shared)
    cyclic = Cyclic(length=shared.pmax + shared.chunk)
    fixed = _with_prefix(Window(window=2 * shared.chunk), shared)
    growing: Visibility = Full(within="causal") if shared.unbounded else window
    return {
        "ca2vdm": Way(config=_config(shared, causal, first=1, positions=cyclic), cache="streams", given=1),
        "os_fix": Way(
            config=replace(_config(shared, fixed, first=shared.chunk, positions=WindowRelative()), commit="recompute"),
            cache="recompute_bidirectional",
            given=shared.chunk,
        ),
        "os_ext": Way(
            config=replace(
                _config(shared, _with_prefix(growing, shared), first=1, positions=WindowRelative()), commit="recompute"
            ),
            cache="recompute_bidirectional",
            given=1,
        ),
        "step_caches": Way(
            config=replace(_config(shared, causal, first=1, positions=cyclic), commit="none"), cache="steps", given=1
        ),
    }


def _with_prefix(visibility: Visibility, shared: ExtensionConfig) -> Visibility:
    if shared.prefix_frames is None:
        return visibility
    return PrefixEnhanced(base=visibility, frames=shared.prefix_frames)


def _config(shared: ExtensionConfig, visibility: Visibility, *, first: int, positions: PositionPolicy) -> RolloutConfig:
    return RolloutConfig(
        plan=ChunkPlan(chunk=shared.chunk, first=first, num_frames=first + shared.num_chunks * shared.chunk),
        schedule=shared.process.schedule(shared.steps),
        visibility=visibility,
        positions=positions,
        process=shared.process,
        solver=Ancestral(process=shared.process),
    )


def kv_bytes(*, layers: int, dim: int, tokens: int, frames: int, batch: int = 1, element_bytes: int = 2) -> int:
    """Bytes of keys and values of `frames` latent frames of `tokens` tokens (arXiv:2411.16375 appendix E).

    Ca2-VDM holds Pmax + P' of them, P' only with prefix-enhanced attention; one cache per step holds that times the
    steps. `batch` counts both branches of guidance.
    """
    return 2 * element_bytes * batch * layers * tokens * dim * frames


@dataclass(frozen=True, kw_only=True)
class HeldBytes:
    """`readable` by later chunks, and `staging`: the slots in which a chunk's own keys and values are written."""

    readable: int
    staging: int


@torch.no_grad()  # a cache is another under autograd
def held_bytes(
    way: Way, network: STDiTConfig, *, tokens: int, batch: int = 1, dtype: torch.dtype = torch.float16
) -> HeldBytes:
    """Bytes of the way's real cache objects, counted on no device with the window full; `tokens` of a latent frame."""
    config, cache_type = way.config, locate(way.cache, CACHES)
    if config.commit == "recompute":
        return HeldBytes(readable=0, staging=0)
    with torch.device("meta"):
        sites = STDiT(network).sites
    cache = cache_type(
        sites, batch=batch, tokens_per_frame=tokens, visibility=config.visibility, positions=config.positions,
        dtype=dtype, device="meta",
    )  # fmt: skip

    def run(kind: Kind, frames: range, sigma: float) -> None:
        context = cache.begin((Segment(kind=kind, frames=frames, sigma=sigma),))
        for site in sites:
            rows, each = (tokens * batch, 1) if site.rows is None else (batch, tokens)
            part = torch.empty(rows, len(frames) * each, site.heads, site.head_dim, dtype=dtype, device="meta")
            context.attend(site, part, part, part, None)

    run(Kind.PREFILL, range(way.given), 0.0)
    cache.promote()
    is_shared = config.commit == "separate"
    chunk = config.plan.chunk
    for index in range(1, 3 + capacity_of(config.visibility) // chunk if is_shared else 2):  # type: ignore[operator]
        frames = range(way.given + (index - 1) * chunk, way.given + index * chunk)
        for step in config.schedule.steps[:1] if is_shared else config.schedule.steps:
            run(Kind.DENOISE, frames, step.sigma)
        if is_shared:
            run(Kind.COMMIT, frames, 0.0)
        cache.promote()
    of_chunk = kv_bytes(
        layers=len(sites), dim=network.dim, tokens=tokens, frames=chunk, batch=batch, element_bytes=dtype.itemsize
    )
    staging = of_chunk * (1 if is_shared else config.schedule.num_steps)
    return HeldBytes(readable=cache.num_bytes - staging, staging=staging)


__all__ = ["ExtensionConfig", "HeldBytes", "Way", "held_bytes", "kv_bytes", "ways"]
