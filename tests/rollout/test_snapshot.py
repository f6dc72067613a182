"""A stream that stops and goes on from a snapshot, in this process and in another one, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import NOISE, Setting, differs, make_network, make_rollout, run, shared_network, text
from torch import Tensor

from unspool.causal.cache.snapshot import Snapshot
from unspool.rollout.noise import CounterNoise
from unspool.rollout.prompts import Switch
from unspool.rollout.rollout import Rollout

ROOT = Path(__file__).parents[2]
GO_ON = 5  # chunks after the snapshot


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A stream, its prompts, and after how many chunks its snapshot is taken."""

    setting: Setting
    switches: Sequence[Switch] = ()
    chunks: int = 6
    options: dict[str, Any] = field(default_factory=dict)
    finish: bool = False  # commit the last chunk before the snapshot

    def rollout(self, network: Any = None, **more: Any) -> Rollout:
        return make_rollout(network or shared_network(), self.setting, text(0), self.switches, **self.options, **more)


def switch(frame: int, number: int, policy: Any, **how: Any) -> Switch:
    return Switch(frame=frame, text=text(number), policy=policy, **how)


WINDOW = Setting(window=5, sink=1, num_frames=40)
RELATIVE = Setting(chunk=2, window=6, sink=2, num_frames=None, relative=True)
GUIDED = replace(RELATIVE, scale=2.0)
THIRD = Setting(chunk=3, window=9, sink=2, num_frames=60, relative=True)
FLUSHED = (switch(12, 1, "flush"), switch(18, 2, "recache"))
SCENARIOS = {
    "window and sink": Scenario(setting=WINDOW),
    "before the first chunk": Scenario(setting=WINDOW, chunks=0),
    "relative": Scenario(setting=RELATIVE),
    "no commit pending": Scenario(setting=RELATIVE, finish=True),
    "fused, commit pending": Scenario(setting=RELATIVE, options={"commit": "fused"}),
    "no commits": Scenario(setting=RELATIVE, options={"commit": "none"}),
    "two caches": Scenario(setting=GUIDED, options={"mode": "two_caches"}),
    "two caches, fused": Scenario(setting=GUIDED, options={"mode": "two_caches", "commit": "fused"}),
    "one batch": Scenario(setting=GUIDED, switches=[switch(4, 1, "keep")]),
    "full": Scenario(setting=Setting(num_frames=40)),
    "multistep": Scenario(setting=replace(WINDOW, solver="multistep", sigmas=(1.0, 0.8, 0.4, 0.0))),
    "after a switch": Scenario(setting=THIRD, switches=[switch(9, 1, "recache")], chunks=5),
    "before a switch": Scenario(setting=THIRD, switches=[switch(11, 1, "recache"), switch(20, 2, "flush")], chunks=4),
    "after a flush": Scenario(setting=THIRD, switches=[switch(12, 1, "flush")], chunks=5),
    "a flush, then a recache": Scenario(setting=THIRD, switches=FLUSHED, chunks=5),
    "flushed without a bound": Scenario(setting=Setting(num_frames=40), switches=[switch(6, 1, "flush")]),
    "after a replaced sink": Scenario(setting=THIRD, switches=[switch(12, 1, "recache", sink="replaced")], chunks=6),
    "before a recomputed sink": Scenario(
        setting=THIRD, switches=[switch(12, 1, "recache", sink="replaced"), switch(21, 2, "recache", sink="recomputed")]
    ),
    "in mid-blend": Scenario(setting=RELATIVE, switches=[switch(9, 1, "keep", over=4)]),
    "in mid-blend, fused": Scenario(
        setting=GUIDED, switches=[switch(4, 1, "keep"), switch(9, 2, "keep", over=4)], options={"commit": "fused"}
    ),
}  # fmt: skip


def go_on(stream: Rollout) -> Tensor:
    return torch.cat([stream.next_chunk().latents for _ in range(GO_ON)], 1)


def bytes_of(name: str) -> tuple[bytes, Tensor, Rollout]:
    """The snapshot's bytes, what the stream did next, and the stream itself."""
    scenario = SCENARIOS[name]
    stream = scenario.rollout()
    for _ in range(scenario.chunks):
        stream.next_chunk()
    if scenario.finish:
        stream.finish()
    data = stream.snapshot().to_bytes()
    return data, go_on(stream), stream


def continued(name: str, data: bytes, network: Any = None) -> Tensor:
    """What a fresh rollout does after the snapshot; its own prompts and past are replaced by those of the snapshot."""
    stream = replace(SCENARIOS[name], switches=()).rollout(network)
    stream.restore(Snapshot.from_bytes(data))
    return go_on(stream)


@pytest.mark.parametrize("name", SCENARIOS)
def test_goes_on_from_its_bytes(name: str) -> None:
    """A restored stream equals the one that was never stopped, and taking a snapshot did not disturb that one."""
    data, want, _ = bytes_of(name)
    assert torch.equal(continued(name, data), want)
    undisturbed = SCENARIOS[name].rollout()
    for _ in range(SCENARIOS[name].chunks):
        undisturbed.next_chunk()
    if SCENARIOS[name].finish:
        undisturbed.finish()
    assert torch.equal(go_on(undisturbed), want)


def child(folder: str, threads: int) -> None:
    """What the new process runs: rebuild the network from its seed, restore every snapshot, go on."""
    torch.set_num_threads(threads)
    network = make_network().requires_grad_(False)
    out = {p.stem: continued(p.stem, p.read_bytes(), network) for p in Path(folder).glob("*.snapshot")}
    save_file(out, Path(folder) / "out.safetensors")


def test_goes_on_in_a_new_process(tmp_path: Path) -> None:
    """Every scenario in one new interpreter: nothing but the bytes, the settings and the seed is handed over."""
    wanted = {}
    for name in SCENARIOS:
        data, wanted[name], _ = bytes_of(name)
        (tmp_path / f"{name}.snapshot").write_bytes(data)
    path = os.pathsep.join([str(ROOT / "src"), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    code = "import sys, test_snapshot; test_snapshot.child(sys.argv[1], int(sys.argv[2]))"
    command = [sys.executable, "-c", code, str(tmp_path), str(torch.get_num_threads())]
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    got = load_file(tmp_path / "out.safetensors")
    assert {name for name in wanted if not torch.equal(got[name], wanted[name])} == set()


def test_a_snapshot_is_independent_of_what_follows() -> None:
    """The object itself shares nothing with the running stream, before it is made into bytes."""
    for name in ("relative", "after a flush", "in mid-blend", "after a replaced sink"):
        scenario = SCENARIOS[name]
        stream = scenario.rollout()
        for _ in range(scenario.chunks):
            stream.next_chunk()
        snapshot = stream.snapshot()
        tensors = {n: t.clone() for n, t in snapshot.tensors.items()}
        facts = json.dumps(snapshot.facts)
        first = go_on(stream)
        stream.switch(text(4), policy="flush")
        go_on(stream)
        assert json.dumps(snapshot.facts) == facts
        assert all(torch.equal(snapshot.tensors[n], t) for n, t in tensors.items())
        for _ in range(2):  # restored twice, into a stream that has moved on
            stream.restore(snapshot)
            assert torch.equal(go_on(stream), first)


def test_a_restored_stream_takes_switches() -> None:
    """Chunks, prompts and their numbers go on as if nothing had happened."""
    scenario = SCENARIOS["in mid-blend"]
    stream, other = scenario.rollout(), replace(scenario, switches=()).rollout()
    for _ in range(6):
        stream.next_chunk()
    other.restore(Snapshot.from_bytes(stream.snapshot().to_bytes()))
    for each in (stream, other):
        each.switch(text(3), policy="recache", sink="recomputed")
    for a, b in zip([stream.next_chunk() for _ in range(4)], [other.next_chunk() for _ in range(4)], strict=True):
        assert torch.equal(a.latents, b.latents)
        assert (a.index, a.frames, a.prompt, a.switched) == (b.index, b.frames, b.prompt, b.switched)
    assert stream.branches.num_bytes == other.branches.num_bytes


# ---- what cannot be restored --------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [
    replace(WINDOW, window=6), replace(WINDOW, sink=2), replace(WINDOW, chunk=1), replace(WINDOW, relative=True),
    replace(WINDOW, sigmas=(1.0, 0.7, 0.0)), replace(WINDOW, sigma_commit=0.1), replace(WINDOW, scale=2.0),
    replace(WINDOW, solver="euler"), replace(WINDOW, num_frames=50), replace(WINDOW, offset=1),
    replace(WINDOW, first_sigmas=(1.0, 0.0)), replace(WINDOW, told=(0.9, 0.7)), replace(WINDOW, window=None, sink=0),
])  # fmt: skip
def test_another_configuration_is_refused(changed: Setting) -> None:
    data, _, _ = bytes_of("window and sink")
    other = make_rollout(shared_network(), changed, text(0))
    with pytest.raises(ValueError, match="snapshot"):
        other.restore(Snapshot.from_bytes(data))


def test_another_batch_dtype_or_network_is_refused() -> None:
    data, _, _ = bytes_of("window and sink")
    single = shared_network(torch.float32)
    for other in (
        make_rollout(shared_network(), WINDOW, text(0, 1)),
        make_rollout(single, WINDOW, text(0, dtype=torch.float32)),
        make_rollout(shared_network(), WINDOW, text(0), commit="fused"),
    ):
        want = go_on(make_rollout(other.backbone, WINDOW, other.timeline.first, commit=other.config.commit))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="snapshot"):
            other.restore(Snapshot.from_bytes(data))
        assert torch.equal(go_on(other), want)  # and nothing of it was taken over


@pytest.mark.parametrize("name", ["window and sink", "after a replaced sink", "after a flush"])
def test_a_refused_snapshot_leaves_the_stream_alone(name: str) -> None:
    """The dtype is only found out after the settings agree; nothing may have been taken over by then."""
    scenario = SCENARIOS[name]
    data, _, _ = bytes_of(name)
    args: Any = (shared_network(torch.float32), scenario.setting, text(0, dtype=torch.float32))
    stream, same = make_rollout(*args), make_rollout(*args)
    for each in (stream, same):
        each.next_chunk()
    with pytest.raises(ValueError, match="snapshot"):
        stream.restore(Snapshot.from_bytes(data))
    assert torch.equal(go_on(stream), go_on(same))


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 100, 1000, -1000, -8, -1])
def test_truncated_bytes_are_refused(cut: int) -> None:
    data, _, _ = bytes_of("window and sink")
    with pytest.raises(ValueError, match=r"Snapshot|snapshot"):
        Snapshot.from_bytes(data[:cut])


def test_foreign_bytes_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "plain.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors", metadata={"format": "pt"})
    facts = {"format": "unspool-snapshot-1", "facts": "{}"}
    save_file({"x": torch.zeros(2)}, tmp_path / "empty.safetensors", metadata=facts)
    for data in (b"", b"\xff" * 64, b"{}", (tmp_path / "plain.safetensors").read_bytes(),
                 (tmp_path / "other.safetensors").read_bytes()):  # fmt: skip
        with pytest.raises(ValueError, match="snapshot"):
            Snapshot.from_bytes(data)
    with pytest.raises(ValueError, match="snapshot"):
        SCENARIOS["relative"].rollout().restore(Snapshot.from_bytes((tmp_path / "empty.safetensors").read_bytes()))


def test_damaged_bytes_are_refused() -> None:
    """One flipped byte, in the header or in the tensors, must not give another stream."""
    data, _, _ = bytes_of("window and sink")
    silent, other = [], []
    for at in range(3, len(data), 997):
        damaged = bytearray(data)
        damaged[at] ^= 0x11
        try:
            make_rollout(shared_network(), WINDOW, text(0)).restore(Snapshot.from_bytes(bytes(damaged)))
            silent.append(at)
        except ValueError:
            pass
        except Exception as error:
            other.append((at, repr(error)))
    assert not other
    assert not silent


@pytest.mark.parametrize("changed", ["weights", "noise", "number of samples"])
def test_another_stream_is_refused(changed: str) -> None:
    """Same settings and sizes, but other weights, another seed or other samples: it would go on as a mixture."""
    data, _, _ = bytes_of("window and sink")
    network, noise = shared_network(), NOISE
    if changed == "weights":
        network = make_network(seed=1).requires_grad_(False)
    else:
        noise = CounterNoise(NOISE.seed + 1) if changed == "noise" else CounterNoise(NOISE.seed, sample_ids=(0, 2))
    with pytest.raises(ValueError, match="snapshot made with other"):
        make_rollout(network, WINDOW, text(0), noise=noise).restore(Snapshot.from_bytes(data))


def test_scenarios_do_something() -> None:
    """Each switch of the scenarios shows in what comes after the snapshot or before it."""
    for scenario in SCENARIOS.values():
        if scenario.switches:
            setting = replace(scenario.setting, num_frames=24)
            args: Any = (shared_network(), setting, text(0))
            assert differs(run(*args, scenario.switches, **scenario.options), run(*args, **scenario.options))
