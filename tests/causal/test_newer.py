"""The texts that snapshots carry are those of before a policy gained a field, until the field is set."""

from __future__ import annotations

from dataclasses import replace

from unspool.causal.cache.snapshot import describe
from unspool.causal.chunks import ChunkPlan
from unspool.causal.position import Cyclic
from unspool.causal.prefix import PrefixEnhanced
from unspool.causal.visibility import Since, Window
from unspool.diffusion.schedule import few_step
from unspool.rollout.settings import RolloutConfig

WINDOW = "Window(window=9, sink=3, within='full', commit_window=None, commit_reads_sink=True, sink_start=0)"
CYCLIC = "Cyclic(length=12, moves_keys=False)"
CONFIG = (
    "plan='ChunkPlan(chunk=3, first=None, num_frames=None)', "
    "schedule='Schedule(sigmas=(1.0, 0.8333333333333334, 0.0), conditioning=None)', "
    f'visibility="Since(base={WINDOW.replace("sink=3", "sink=0")}, floor=4, keep=FrameSet(intervals=()))", '
    f"positions='{CYCLIC}', "
    "solver='FewStep(process=FlowMatching())', guidance=\"Guidance(scale=1.0, mode='batch')\", "
    "process='FlowMatching()', first_schedule=None, sigma_commit=0.0, commit='separate'"
)


def test_texts_of_defaults_are_those_of_older_snapshots() -> None:
    window, cyclic = Window(window=9, sink=3), Cyclic(length=12)
    assert describe(window) == WINDOW and describe(cyclic) == CYCLIC
    assert describe(PrefixEnhanced(base=window, frames=2)) == f"PrefixEnhanced(base={WINDOW}, frames=2)"
    config = RolloutConfig(
        plan=ChunkPlan(chunk=3),
        schedule=few_step((1000, 500), shift=5.0),
        visibility=Since(base=replace(window, sink=0), floor=4),  # a circle goes with no sink
        positions=cyclic,
    )
    assert config.fingerprint == CONFIG
    noised = replace(config, commit_noise=0.1)
    assert noised.fingerprint == CONFIG.replace("commit='", "commit_noise=0.1, commit='")


def test_a_newer_field_that_is_set_is_told() -> None:
    causal = Window(window=9, sink=3, commit_within="causal")
    assert describe(causal) == WINDOW[:-1] + ", commit_within='causal')"
    assert describe(Since(base=causal, floor=4)) != describe(Since(base=replace(causal, commit_within=None), floor=4))
    turned = Cyclic(length=12, offset=4)
    assert describe(turned) == "Cyclic(length=12, offset=4, moves_keys=False)"
    assert eval(describe(turned)) == turned and eval(describe(causal)) == causal
