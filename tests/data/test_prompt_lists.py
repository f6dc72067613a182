"""Prompt-only lists: every prompt once per epoch, the same whatever came before."""

from __future__ import annotations

from pathlib import Path

import pytest

from unspool.data.batch import Source
from unspool.data.prompts import PromptList, PromptListConfig


def test_an_epoch_holds_every_prompt_once(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("\ufeffa red ball\r\n\n  two, \u2028 \U0001f600 \nthree\n", encoding="utf-8")
    source = PromptList(PromptListConfig(path=str(file), seed=2))
    assert isinstance(source, Source) and source.prompts == ("a red ball", "two, \u2028 \U0001f600", "three")
    seen = [source.batch(step, 2) for step in range(3)]
    assert sorted(c for batch in seen for (c,) in batch.captions) == sorted(source.prompts * 2)
    assert all(source.prompts[i] == c for b in seen for i, (c,) in zip(b.indices.tolist(), b.captions, strict=True))
    again = PromptList(PromptListConfig(path=str(file), seed=2))
    assert again.batch(2, 2).captions == seen[2].captions
    ranks = [again.batch(1, 2, rank=rank, world=2).captions[0] for rank in range(2)]
    assert tuple(ranks) == seen[1].captions
    ordered = PromptList(PromptListConfig(path=str(file), shuffle=False))
    assert ordered.batch(0, 3).captions == tuple((prompt,) for prompt in source.prompts)


def test_files_without_prompts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="got no prompts"):
        PromptList(PromptListConfig(path=str(tmp_path / "empty.txt")))
    with pytest.raises(FileNotFoundError):
        PromptList(PromptListConfig(path=str(tmp_path / "none.txt")))
    with pytest.raises(ValueError, match="set path="):
        PromptList(PromptListConfig())
