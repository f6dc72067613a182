"""A cache to bytes and back, here and in another process, and bytes that are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FULL, RELATIVE, RULE, network_of, setup
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    Rule,
    assert_equal_outputs,
    denoise,
    make_cache,
    make_inputs,
    make_network,
    only,
    step,
)

from unspool.causal.cache.snapshot import Snapshot
from unspool.causal.visibility import Full, Kind


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def same_state(a: Snapshot, b: Snapshot) -> bool:
    """Equal facts and bitwise equal tensors (the order of a safetensors header is not fixed)."""
    return (
        json.loads(json.dumps(a.facts)) == json.loads(json.dumps(b.facts))
        and a.tensors.keys() == b.tensors.keys()
        and all(torch.equal(t, b.tensors[name]) for name, t in a.tensors.items())
    )


# ---- snapshots ----------------------------------------------------------------------------------------------------

CHILD = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from oracle import Rule, chunk_bounds, commit, denoise, make_cache, make_inputs, make_network
from unspool.causal.cache.snapshot import Snapshot
torch.set_num_threads(1)
folder, policy = Path(sys.argv[1]), sys.argv[2]
rule = Rule(chunk=2, num_frames=14, window=6, sink=1, policy=policy)
with torch.no_grad():
    network = make_network(dtype=torch.float64)
    inputs = make_inputs(network, rule)
    cache = make_cache(network, rule, inputs)
    cache.restore(Snapshot.from_bytes((folder / "state").read_bytes()))
    outputs = []
    for start, end in chunk_bounds(rule)[5:7]:
        outputs.append(denoise(network, cache, inputs, range(start, end)))
        outputs.append(commit(network, cache, inputs, range(start, end)))
save_file({"out": torch.cat(outputs, 1)}, folder / "out.safetensors")
"""


@pytest.mark.parametrize("rule", [RULE, RELATIVE, FULL], ids=["absolute", "relative", "full"])
def test_snapshot_continues_bit_for_bit(rule: Rule) -> None:
    rule = replace(rule, num_frames=16)
    network, cache, inputs = setup(rule, 5)
    data = cache.snapshot().to_bytes()
    want = step(network, cache, rule, inputs, 5, 8)
    other = make_cache(network, rule, inputs)
    step(network, other, rule, inputs, 0, 2)  # a used cache: nothing of it may stay
    for target in (cache, other, make_cache(network, rule, inputs)):
        target.restore(Snapshot.from_bytes(data))
        assert torch.equal(step(network, target, rule, inputs, 5, 8), want)


def test_a_snapshot_shares_nothing_with_the_running_cache() -> None:
    network, cache, inputs = setup(RELATIVE, 5)
    snapshot = cache.snapshot()
    copy = Snapshot.from_bytes(snapshot.to_bytes())
    assert same_state(snapshot, copy)
    step(network, cache, RELATIVE, inputs, 5, 7)
    assert same_state(snapshot, copy) and not same_state(cache.snapshot(), copy)
    cache.restore(snapshot)
    step(network, cache, RELATIVE, inputs, 5, 7)
    assert same_state(snapshot, copy)


def test_a_snapshot_in_the_middle_of_a_chunk_holds_what_is_promoted() -> None:
    network, cache, inputs = setup(RELATIVE, 5)
    denoise(network, cache, inputs, range(10, 12))
    data = cache.snapshot().to_bytes()
    want = step(network, cache, RELATIVE, inputs, 5, 7)
    cache.restore(Snapshot.from_bytes(data))
    assert_equal_outputs(step(network, cache, RELATIVE, inputs, 5, 7), want)


def test_a_snapshot_between_begin_and_forward_holds_the_planned_move() -> None:
    network, cache, inputs = setup(RELATIVE, 5)
    want = step(network, cache, RELATIVE, inputs, 5, 7)
    network, cache, inputs = setup(RELATIVE, 5)
    cache.begin(only(Kind.DENOISE, 10, 12))
    data = cache.snapshot().to_bytes()
    cache.restore(Snapshot.from_bytes(data))
    assert_equal_outputs(step(network, cache, RELATIVE, inputs, 5, 7), want)


@pytest.mark.parametrize("policy", ["absolute", "relative"])
def test_snapshot_continues_in_another_process(policy: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    rule = replace(RULE, policy=policy)
    network, cache, inputs = setup(rule, 5)
    (tmp_path / "state").write_bytes(cache.snapshot().to_bytes())
    want = step(network, cache, rule, inputs, 5, 7)
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, *(p for p in sys.path if p)])
    subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), policy], check=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert torch.equal(load_file(tmp_path / "out.safetensors")["out"], want)


@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_damaged_bytes_are_refused(data: st.DataObject) -> None:
    """Cut anywhere, or one byte changed in the header: a ValueError, never another error, never a wrong state."""
    whole = snapshot_bytes()
    if data.draw(st.booleans()):
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        header = 8 + int.from_bytes(whole[:8], "little")
        at = data.draw(st.integers(0, header - 1))
        damaged = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    network = network_of()
    inputs = make_inputs(network, RULE)
    cache = make_cache(network, RULE, inputs)
    try:
        cache.restore(Snapshot.from_bytes(damaged))
    except ValueError as error:
        assert "snapshot" in str(error)
    else:
        assert same_state(cache.snapshot(), Snapshot.from_bytes(whole)), "damaged bytes were taken for another state"


@lru_cache(maxsize=1)
def snapshot_bytes() -> bytes:
    with torch.no_grad():
        return setup(RULE, 5)[1].snapshot().to_bytes()


def test_a_changed_payload_is_refused() -> None:
    whole = bytearray(snapshot_bytes())
    whole[-100] ^= 0x40
    with pytest.raises(ValueError, match="snapshot"):
        Snapshot.from_bytes(bytes(whole))


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 3},
        {"tokens_per_frame": 5},
        {"dtype": torch.float32},
        {"visibility": replace(RULE, window=8).visibility},
        {"visibility": replace(RULE, window=4).visibility},
        {"visibility": Full()},
        {"positions": RELATIVE.positions},
    ],
    ids=str,
)
def test_a_snapshot_of_other_sizes_is_refused(change: dict[str, Any]) -> None:
    network = network_of()
    inputs = make_inputs(network, RULE)
    cache = make_cache(network, RULE, inputs, **change)
    before = cache.snapshot()
    with pytest.raises(ValueError, match="snapshot"):
        cache.restore(Snapshot.from_bytes(snapshot_bytes()))
    assert same_state(cache.snapshot(), before), "a refused snapshot must leave the cache as it was"


@pytest.mark.parametrize("layers", [2, 4])
def test_a_snapshot_of_another_network_is_refused(layers: int) -> None:
    network = make_network(layers=layers, dtype=torch.float64)
    cache = make_cache(network, RULE, make_inputs(network, RULE))
    with pytest.raises(ValueError, match="snapshot"):
        cache.restore(Snapshot.from_bytes(snapshot_bytes()))
