"""Frames that leave a latent frame at a time, between the passes of the next chunk, are the frames of whole chunks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import pipeline, shared

from unspool.engine.session import Paused, Session
from unspool.engine.stream import _Pace
from unspool.rollout.settings import Cancelled

RED, BLUE = "a red ball bounces at sunset", "a blue star drifts left at night"


def whole(session: Session, count: int) -> np.ndarray:
    return np.concatenate([session.next_chunk() for _ in range(count)])


def pieces(session: Session, count: int) -> list[np.ndarray]:
    made = [piece for _ in range(count) for piece in session.pieces()]
    return made + list(session.rest())


def test_pieces_are_the_frames_of_chunks_and_follow_prompts() -> None:
    expected = whole(shared().session(RED, switches=[(20 / 16, BLUE)]), 4)
    session = shared().session(RED, switches=[(20 / 16, BLUE)])
    made = pieces(session, 4)
    assert [len(piece) for piece in made] == [1] + [4] * (len(made) - 1)
    assert (np.concatenate(made) == expected).all()
    assert [event.prompt for event in session.events] == [BLUE]
    assert session.chunk == 4 and session.timing.chunks == 4 and session.timing.frames == len(expected)


def test_passes_of_a_chunk_lie_between_the_pieces_of_the_one_before() -> None:
    passes: list[int] = []
    session = shared().session(RED, cancel=lambda: passes.append(1) is not None and False)
    at = []
    for _ in range(3):
        for _ in session.pieces():
            at.append(len(passes))
    count = session.stream.rollout.num_passes
    assert count == session.settings.steps + 1, "steps and a commit pass"
    first = count - 1  # no commit is due in chunk 0
    later = [k - first for k in at[1:]]
    size = session.settings.chunk
    assert len(at) == 1 + 2 * size and at[0] == first
    for k in range(2):
        gaps = np.diff([k * count, *later[k * size : (k + 1) * size]])
        assert gaps.sum() == count and gaps.max() - gaps.min() <= 1, "as even as whole passes can be"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 12), st.integers(1, 60))
def test_the_pace_is_even_and_never_early(count: int, passes: int) -> None:
    pace = _Pace(count, passes)
    given_out = 0
    for done in range(passes):
        now = pace.due()
        given_out += now
        assert now >= 0 and given_out <= (count + 1) * done / passes
    assert given_out <= count


def test_a_chunk_that_pieces_began_ends_with_next_chunk() -> None:
    expected = whole(shared().session(RED), 3)
    session = shared().session(RED)
    first = list(session.pieces())
    made = np.concatenate([*first, session.next_chunk(), session.next_chunk(), session.next_chunk()])
    assert (made == expected).all() and len(first) == 1


def test_a_cancelled_or_abandoned_chunk_is_made_again() -> None:
    expected = whole(shared().session(RED), 3)
    asked = [0]

    def cancel() -> bool:
        asked[0] += 1
        return asked[0] == 4

    session = shared().session(RED, cancel=cancel)
    made = list(session.pieces())
    with pytest.raises(Cancelled):
        for piece in session.pieces():
            made.append(piece)
    taken = session.pieces()
    if session.stream.num_undecoded:
        made.append(next(taken))
    taken.close()
    made += pieces(session, 2)
    assert (np.concatenate(made) == expected).all()


@pytest.mark.parametrize("steps", [1, 2])  # of 1 step a chunk has fewer passes than latent frames
@pytest.mark.parametrize("left_at", range(1, 8))
def test_a_stream_that_is_left_at_any_piece_goes_on(steps: int, left_at: int, tmp_path: Path) -> None:
    model = shared()
    expected = whole(model.session(RED, steps=steps), 3)
    session, made = model.session(RED, steps=steps), []
    while len(made) < left_at:
        taken = session.pieces()
        for piece in taken:
            made.append(piece)
            if len(made) == left_at:
                taken.close()
                break
    restored = Session.restore(session.snapshot(tmp_path / "s"), model)
    assert (restored.chunk, restored.stream.rollout.index) == (session.chunk, session.stream.rollout.index)
    made += pieces(restored, 3 - restored.stream.rollout.index)
    assert (np.concatenate(made) == expected).all()
    by_chunks = session.next_chunk()
    assert (by_chunks[-4:] == expected[: session.stream.clock.first_frame(session.chunk)][-4:]).all()


def test_the_first_frame_counts_when_it_leaves() -> None:
    session = shared().session(RED)
    first = next(session.pieces())
    early = session.timing
    assert len(first) == 1 and early.chunks == 0 and early.first_frame_ms is not None
    pieces(session, 2)
    assert session.timing.first_frame_ms == early.first_frame_ms


def test_a_snapshot_between_pieces_goes_on(tmp_path: Path) -> None:
    model = pipeline()
    expected = whole(model.session(RED), 3)
    session = model.session(RED)
    made = [*session.pieces(), next(session.rest())]
    restored = Session.restore(session.snapshot(tmp_path / "s"), model)
    made += pieces(restored, 2)
    assert (np.concatenate(made) == expected).all()


def test_a_failing_decoder_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = whole(shared().session(RED), 2)
    session = shared().session(RED)
    decode, calls = session.stream.decoder.next, [0]

    def sometimes(latents: object) -> np.ndarray:
        calls[0] += 1
        if calls[0] == 5:
            raise RuntimeError("no memory")
        return decode(latents)  # type: ignore[arg-type]

    monkeypatch.setattr(session.stream.decoder, "next", sometimes)
    made = [session.next_chunk()]
    with pytest.raises(RuntimeError, match="no memory"):
        session.next_chunk()
    made.append(session.next_chunk())
    assert (np.concatenate(made) == expected).all()


def test_a_paused_session_gives_no_pieces() -> None:
    session = shared().session(RED)
    session.pause()
    with pytest.raises(Paused):
        next(session.pieces())
