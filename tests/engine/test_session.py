"""Sessions: what is set when, pausing, starting again, and snapshots that continue bit for bit."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tiny_model import SETTINGS, SPEC, load, pipeline, save, shared

from unspool.engine.session import Paused, Session
from unspool.rollout.settings import Cancelled

RED, BLUE = "a red ball bounces at sunset", "a blue star drifts left at night"


def chunks(session: Session, count: int) -> np.ndarray:
    return np.concatenate([session.next_chunk() for _ in range(count)])


def test_the_last_of_several_changes_for_one_chunk_counts() -> None:
    session, other = shared().session(RED), shared().session(RED)
    assert session.set(prompt="left") == session.set(prompt=BLUE) == 0.0
    other.set(prompt=BLUE)
    assert (chunks(session, 2) == chunks(other, 2)).all()
    assert [event.prompt for event in session.events] == [BLUE] and session.prompt == BLUE


def test_a_change_may_be_planned_and_a_nearer_one_comes_first() -> None:
    session = shared().session(RED)
    assert session.set(prompt=BLUE, at=2.0) == pytest.approx(33 / 16)
    assert session.set(prompt="left") == 0.0
    chunks(session, 4)
    assert [(event.chunk, event.prompt) for event in session.events] == [(0, "left"), (3, BLUE)]
    assert session.set(prompt=RED, at=0.1) == session.seconds  # what is over cannot be changed


def test_a_change_during_a_chunk_takes_effect_at_the_next_one() -> None:
    """Another thread sets a prompt while chunk 1 is being made: chunk 1 is untouched, chunk 2 follows."""
    reference = shared().generate(RED, chunks=3, switches=[(20 / 16, BLUE)])
    done: list[float] = []

    def ask() -> bool:
        if session.chunk == 1 and not done:
            thread = threading.Thread(target=lambda: done.append(session.set(prompt=BLUE)))
            thread.start()
            thread.join()
        return False

    session = shared().session(RED, cancel=ask)
    made = chunks(session, 3)
    assert done == [21 / 16] and (made == reference.frames).all()


def test_a_record_tells_only_of_prompts_that_its_frames_follow() -> None:
    session = shared().session(RED, switches=[(1.0, BLUE)])
    chunks(session, 3)
    assert session.events and session.record(num_frames=21).events == ()
    assert session.record(num_frames=22).events == tuple(session.events)


def test_pause_resume_and_iteration() -> None:
    session = shared().session(RED, seed=4)
    made = []
    for chunk in session:
        made.append(chunk)
        if len(made) == 2:
            session.pause()
    with pytest.raises(Paused):
        session.next_chunk()
    session.resume()
    made.append(session.next_chunk())
    assert (np.concatenate(made) == shared().generate(RED, chunks=3, seed=4).frames).all()


def test_reset_is_a_new_session() -> None:
    session = shared().session(RED, seed=4)
    first = chunks(session, 2)
    session.set(prompt=BLUE)
    chunks(session, 1)
    session.reset(prompt=RED)
    assert session.seconds == 0 and session.events == [] and (chunks(session, 2) == first).all()
    session.reset(seed=5)
    assert session.prompt == RED and (chunks(session, 2) == shared().generate(RED, chunks=2, seed=5).frames).all()


def test_a_reset_that_fails_changes_nothing() -> None:
    session = shared().session(RED, seed=4)
    made = [session.next_chunk()]
    with pytest.raises(ValueError, match="seed"):
        session.reset(seed=-1)
    made.append(session.next_chunk())
    assert session.seed == 4 and (np.concatenate(made) == shared().generate(RED, chunks=2, seed=4).frames).all()


def test_a_cancelled_chunk_is_made_again() -> None:
    asked = iter([False, False, False, True])
    session = shared().session(RED, cancel=lambda: next(asked, False))
    made = [session.next_chunk()]
    with pytest.raises(Cancelled):
        session.next_chunk()
    made.append(session.next_chunk())
    assert (np.concatenate(made) == shared().generate(RED, chunks=2).frames).all()


def test_after_a_cancelled_chunk_a_change_of_prompt_reaches_it() -> None:
    stops = [False, False, False, True]
    session = shared().session("a red ball", cancel=lambda: bool(stops) and stops.pop(0))
    session.next_chunk()
    with pytest.raises(Cancelled):
        session.next_chunk()
    assert session.set(prompt="a blue star") == session.seconds
    other = shared().session("a red ball")
    other.next_chunk()
    other.set(prompt="a blue star")
    assert (session.next_chunk() == other.next_chunk()).all() and session.prompt == "a blue star"


def test_a_policy_that_is_none_is_refused_when_it_is_given() -> None:
    session = shared().session("a red ball")
    with pytest.raises(ValueError, match=r"switch_policy='recahe': expected one of 'keep', 'recache'"):
        session.set(prompt="a blue star", switch_policy="recahe")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="switch_policy='bogus'"):
        shared().generate("a red ball", frames=9, switch_policy="bogus")  # type: ignore[arg-type]
    session.next_chunk()
    assert session.prompt == "a red ball" and session.events == []


def test_a_change_that_fails_leaves_prompt_and_events_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    session = shared().session("a red ball")
    session.set(prompt="a blue star")
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(session.stream, "switch", lambda prompts, event: (_ for _ in ()).throw(MemoryError()))
        session.next_chunk()
    assert session.prompt == "a red ball" and session.events == []


@pytest.mark.parametrize("count", [1, 9, 20])
def test_a_session_of_a_clip_ends_with_it(count: int, tmp_path: Path) -> None:
    whole = shared().generate("a red ball", frames=count).frames
    session = shared().session("a red ball", frames=count)
    assert (np.concatenate(list(session)) == whole).all() and session.is_finished
    session = shared().session("a red ball", frames=count)
    first = next(iter(session))
    session.snapshot(tmp_path / "a.snapshot")
    rest = list(Session.restore(tmp_path / "a.snapshot", shared()))
    assert (np.concatenate([first, *rest]) == whole).all()


def test_a_restored_session_can_be_cancelled(tmp_path: Path) -> None:
    session = shared().session("a red ball")
    session.next_chunk()
    session.snapshot(tmp_path / "a.snapshot")
    restored = Session.restore(tmp_path / "a.snapshot", shared(), cancel=lambda: True)
    with pytest.raises(Cancelled):
        restored.next_chunk()


def test_snapshots_while_another_thread_plans_changes(tmp_path: Path) -> None:
    session = shared().session("a red ball")
    session.next_chunk()
    over = threading.Event()

    def plans() -> None:
        second = 0
        while not over.is_set():
            second += 1
            session.set(prompt="a blue star", at=float(second))

    thread = threading.Thread(target=plans)
    thread.start()
    try:
        for _ in range(10):
            session.snapshot(tmp_path / "a.snapshot")
    finally:
        over.set()
        thread.join()


def test_numpy_numbers_are_taken_and_recorded_as_plain_ones(tmp_path: Path) -> None:
    options = {"seed": np.int64(3), "window": np.int64(9), "guidance": np.float32(2)}
    video = shared().generate("a red ball", frames=9, **options)
    assert (video.frames == shared().generate("a red ball", frames=9, seed=3, window=9, guidance=2.0).frames).all()
    video.save(tmp_path / "a.npy")
    assert json.loads((tmp_path / "a.npy.json").read_text())["seed"] == 3
    (many,) = shared().generate_many(["a red ball"], frames=9, seed=np.int64(3), samples=[np.int64(0)])
    assert many.record.seed == 3 and type(many.record.seed) is int
    with pytest.raises(ValueError, match=r"window=9\.5: expected a whole number of latent frames or 'full'"):
        shared().generate("a red ball", frames=9, window=9.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="window='all'"):
        shared().session("a red ball", window="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a list of prompts, got one text"):
        shared().generate_many("a red ball", frames=9)


def test_a_solver_of_another_process_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match="solver='ancestral' with process='flow': it is made for IDDPM"):
        shared().with_settings(replace(shared().spec.rollout, solver="ancestral"))


def test_a_chunk_whose_decoding_failed_is_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    session = shared().session(RED)
    made = [session.next_chunk()]
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(session.stream.decoder, "next", lambda latents: (_ for _ in ()).throw(MemoryError()))
        session.next_chunk()
    assert session.chunk == 1
    made.append(session.next_chunk())
    assert (np.concatenate(made) == shared().generate(RED, chunks=2).frames).all()


def test_memory_is_constant_once_the_window_is_full() -> None:
    session = shared().session(RED)
    sizes = []
    for number in range(9):
        session.set(prompt=[RED, BLUE][number % 2])
        session.next_chunk()
        sizes.append(session.num_bytes)
    assert len(set(sizes)) == 1
    assert len(session.stream.rollout.timeline.switches) <= 3 and not session._agenda


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save(path)
    return path


@settings(max_examples=6, deadline=None)
@given(
    before=st.integers(0, 4),
    policy=st.sampled_from(["keep", "recache", "flush"]),
    commit=st.sampled_from(["separate", "fused"]),
    planned=st.booleans(),
)
def test_a_snapshot_continues_bit_for_bit(
    before: int, policy: str, commit: str, planned: bool, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In another pipeline, with a switch just behind, just set, and one still planned."""
    path = tmp_path_factory.mktemp("snapshots") / "session.safetensors"
    source, target = load(folder), load(folder)
    for each in (source, target):
        each.spec = replace(each.spec, rollout=replace(SETTINGS, switch_policy=policy, commit=commit))
    session = source.session(RED, seed=7, switches=[(0.5, BLUE)])
    chunks(session, before) if before else None
    session.set(prompt="left at night")
    if planned:
        session.set(prompt=RED, at=3.5)
    assert session.snapshot(path) == path
    expected = chunks(session, 4)
    resumed = Session.restore(path, target)
    assert resumed.chunk == before and (chunks(resumed, 4) == expected).all()
    assert resumed.events == session.events and resumed.prompt == session.prompt
    assert resumed.record(num_frames=99) == session.record(num_frames=99)


def test_snapshots_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    session = load(folder).session(RED)
    session.next_chunk()
    path = session.snapshot(tmp_path / "a.safetensors")
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["facts"])["version"] == 1
    other = tmp_path / "other"
    save(other, seed=1)
    with pytest.raises(ValueError, match="load the model it was taken from"):
        Session.restore(path, load(other))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"bad\.safetensors: snapshot: .* damaged"):
        Session.restore(tmp_path / "bad.safetensors", load(folder))
    path.write_bytes(session.stream.snapshot().to_bytes())
    with pytest.raises(ValueError, match="expected"):
        Session.restore(path, load(folder))


def test_a_snapshot_names_no_class_outside_of_the_codec_s_package() -> None:
    from unspool.causal.cache.snapshot import Snapshot
    from unspool.engine.decode import Decoder

    decoder = Decoder(pipeline(SPEC).codec)
    for name, message in (("subprocess:Popen", "expected one of"), ("unspool.models.taehv:Taehv", "no dataclass")):
        with pytest.raises(ValueError, match=message):
            decoder.restore(Snapshot({}, {"state": {"class": name, "fields": {}}}))
