"""Published ODE pairs: the layout of CausVid and Self-Forcing, written here as their scripts write it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from unspool.data.batch import Source, TrajectoryBatch
from unspool.data.ode_lmdb import OdeLmdb, OdeLmdbConfig

SHAPE = (4, 3, 2, 5, 6)


def write_pairs(folder: Path, first: int, count: int, *, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    lmdb = pytest.importorskip("lmdb", reason="the extra [data] is not installed")
    folder.mkdir(parents=True)
    values = np.random.default_rng(first).standard_normal((count, *shape)).astype(np.float16)
    with lmdb.open(str(folder), map_size=2**22) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"latents_shape", " ".join(map(str, values.shape)).encode())
        for row in range(count):
            transaction.put(f"latents_{row}_data".encode(), values[row].tobytes())
            transaction.put(f"prompts_{row}_data".encode(), f"prompt {first + row} é".encode())
    return values


def test_trajectories_and_prompts_are_read_exactly(tmp_path: Path) -> None:
    values = write_pairs(tmp_path / "a", 0, 5)
    source = OdeLmdb(OdeLmdbConfig(path=str(tmp_path / "a"), seed=1))
    assert isinstance(source, Source) and len(source) == 5 and source.shape == SHAPE
    batch = source.batch(0, 5)
    assert isinstance(batch, TrajectoryBatch) and sorted(batch.indices.tolist()) == [*range(5)]
    expected = torch.from_numpy(values).float()[batch.indices]
    assert torch.equal(batch.trajectory, expected) and torch.equal(batch.latents, expected[:, -1])
    assert batch.captions == tuple((f"prompt {index} é",) for index in batch.indices.tolist())
    assert torch.equal(batch.to("cpu").trajectory, expected)
    again = OdeLmdb(OdeLmdbConfig(path=str(tmp_path / "a"), seed=1))
    assert torch.equal(again.batch(3, 2).indices, source.batch(3, 2).indices)
    parts = [again.batch(1, 4, rank=rank, world=2).indices for rank in range(2)]
    assert torch.equal(torch.stack(parts, 1).flatten(), source.batch(1, 4).indices)


def test_several_environments_are_one_list(tmp_path: Path) -> None:
    parts = [write_pairs(tmp_path / "d" / f"{number}", 3 * number, 3) for number in range(2)]
    source = OdeLmdb(OdeLmdbConfig(path=str(tmp_path / "d")))
    whole = torch.from_numpy(np.concatenate(parts)).float()
    batch = source.clips(range(6))
    assert torch.equal(batch.trajectory, whole) and batch.captions[4] == ("prompt 4 é",)
    write_pairs(tmp_path / "d" / "odd", 9, 1, shape=(2, 3, 2, 5, 6))
    with pytest.raises(ValueError, match="expected one shape"):
        OdeLmdb(OdeLmdbConfig(path=str(tmp_path / "d")))


def test_clean_latents_alone_are_trajectories_of_one_step(tmp_path: Path) -> None:
    values = write_pairs(tmp_path / "clean", 0, 2, shape=SHAPE[1:])
    source = OdeLmdb(OdeLmdbConfig(path=str(tmp_path / "clean")))
    assert torch.equal(source.clips([1]).latents[0], torch.from_numpy(values[1]).float())


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb", reason="the extra [data] is not installed")
    with pytest.raises(FileNotFoundError):
        OdeLmdb(OdeLmdbConfig(path=str(tmp_path / "none")))
    with pytest.raises(ValueError, match=r"without data\.mdb"):
        OdeLmdb(OdeLmdbConfig(path=str(tmp_path)))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "data.mdb").write_bytes(b"x" * 9000)
    with pytest.raises(ValueError, match="not a readable LMDB"):
        OdeLmdb(OdeLmdbConfig(path=str(tmp_path / "bad")))
    write_pairs(tmp_path / "cut", 0, 2)
    with lmdb.open(str(tmp_path / "cut"), map_size=2**22) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"latents_1_data", b"xx")
    source = OdeLmdb(OdeLmdbConfig(path=str(tmp_path / "cut")))
    with pytest.raises(ValueError, match="got 2 bytes for trajectory 1"):
        source.clips([1])
    del source
    with lmdb.open(str(tmp_path / "cut"), map_size=2**22) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"latents_shape", b"what")
    with pytest.raises(ValueError, match="got latents_shape b'what'"):
        OdeLmdb(OdeLmdbConfig(path=str(tmp_path / "cut")))


def test_without_the_extra_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.mdb").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ValueError, match=r"pip install 'unspool\[data\]'"):
        OdeLmdb(OdeLmdbConfig(path=str(tmp_path)))
