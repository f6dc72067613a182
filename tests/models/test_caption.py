"""The caption encoder: what it reads of a text, that nothing is fatal, its states, and its file."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unspool.config import apply_overrides, from_dict, to_dict
from unspool.models.caption import EMPTY, CaptionConfig, CaptionEncoder
from unspool.models.caption_words import Vocabulary, allowance, distance
from unspool.weights.write import save_file

WORDS = ("a", "red", "blue", "ball", "star", "box", "bounces", "drifts", "left", "right", "night", "at", "triangle")
VOCABULARY = Vocabulary(WORDS)


def make(seed: int = 0, **sizes: object) -> CaptionEncoder:
    torch.manual_seed(seed)
    values = {"words": WORDS, "dim": 32, "out_dim": 12, "layers": 2, "heads": 4, "rows": 8, "slots": 3, **sizes}
    return CaptionEncoder(CaptionConfig(**values))  # type: ignore[arg-type]


def words(caption: str, rows: int = 20) -> str:
    return " ".join(WORDS[place] for place in VOCABULARY.read(caption, rows).words)


@pytest.mark.parametrize(
    ("caption", "read", "unknown"),
    [
        ("A  RED, Ball!!\tbounces...", "a red ball bounces", ()),
        ("r\u00e9d \uff42\uff41\uff4c\uff4c", "red ball", ()),  # accents, full-width letters
        ("two balls' boxes, the star's box", "ball box star box", ("two", "the")),
        ("red-blue/left", "red blue left", ()),
        ("bal balll bounecs trianlges", "ball bounces triangle", ("bal",)),  # no typo is forgiven in three letters
        ("rde rad sand", "", ("rde", "rad", "sand")),
        ("light bounce drift", "right bounces drifts", ()),  # right and night are equally near: the frequent one
        ("\U0001f680\ufe0f red \u7ea2\u8272\u7684\u7403 \u0928\u092e\u0938\u094d\u0924\u0947", "red",
         ("\U0001f680", "\u7ea2\u8272\u7684\u7403", "\u0928\u092e\u0938\u094d\u0924\u0947")),
        ("", "", ()),
        ("...\x00\ud800\u200d", "", ()),
    ],
)  # fmt: skip
def test_what_is_read(caption: str, read: str, unknown: tuple[str, ...]) -> None:
    assert words(caption) == read
    assert VOCABULARY.read(caption, 20).unknown == unknown


def test_corrections_are_told() -> None:
    assert VOCABULARY.read("balls bounecs", 20).corrected == (("bounecs", "bounces"),)


def slow_distance(a: str, b: str) -> int:
    """Optimal string alignment, written as its recursion."""
    if not a or not b:
        return len(a) + len(b)
    costs = [
        slow_distance(a[:-1], b) + 1,
        slow_distance(a, b[:-1]) + 1,
        slow_distance(a[:-1], b[:-1]) + (a[-1] != b[-1]),
    ]
    if len(a) > 1 and len(b) > 1 and a[-1] == b[-2] and a[-2] == b[-1]:
        costs.append(slow_distance(a[:-2], b[:-2]) + 1)
    return min(costs)


@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_distance_equals_its_recursion(a: str, b: str) -> None:
    assert distance(a, b) == slow_distance(a, b) == distance(b, a)


@given(st.sampled_from([w for w in WORDS if len(w) >= 4]), st.data())
def test_the_nearest_word_equals_a_search_of_all(word: str, data: st.DataObject) -> None:
    """The quick rejections by length and letters lose nothing."""
    place = data.draw(st.integers(0, len(word) - 1))
    other = data.draw(st.sampled_from("xyz"))
    typo = data.draw(st.sampled_from([word[:place] + word[place + 1 :], word[:place] + other + word[place:]]))
    if data.draw(st.booleans()):
        typo = other + typo
    limit = allowance(len(typo))
    near = [(distance(typo, known), i) for i, known in enumerate(WORDS) if len(known) >= 4]
    near = [(d, i) for d, i in near if d <= min(limit, allowance(len(WORDS[i]) + 1))]
    forms = {typo, typo + "s"} | ({typo[:-1]} if typo.endswith("s") else set())
    if not forms & set(WORDS):
        assert VOCABULARY.find(typo) == (min(near)[1] if near else None)


@given(st.text(max_size=200))
@settings(max_examples=30, deadline=None)
def test_no_text_is_fatal(caption: str) -> None:
    encoder = make()
    states = encoder([caption])
    assert torch.isfinite(states).all() and states.shape == (1, 11, 12)
    assert all(isinstance(word, str) and word for word in encoder.unknown(caption))


def test_long_captions_are_cut_and_reported() -> None:
    encoder = make()
    caption = "red " * 7 + "ball star left nonsense"
    assert encoder.unknown(caption) == ["star", "left", "nonsense"]
    assert torch.equal(encoder([caption]), encoder(["red " * 7 + "ball"]))
    for long in ("x" * 10_000, "nothing known here " * 600):
        assert encoder.unknown(long)
        assert torch.equal(encoder([long]), encoder([""]))  # nothing known: as if nothing was said


def test_states_of_a_caption_do_not_depend_on_its_neighbours() -> None:
    encoder = make().double()
    alone = encoder(["a red ball"])
    among = encoder(["", "a red ball", "blue star drifts left at night a a"])
    torch.testing.assert_close(among[1:2], alone, rtol=0, atol=1e-12)
    assert (among[1, 6:] == 0).all() and (among[1, :6] != 0).any(-1).all()
    assert (among[0, 4:] == 0).all() and (among[0, :4] != 0).any(-1).all()  # slots and the word for no caption
    assert (among[2] != 0).any(-1).all()


def test_every_word_and_the_order_reach_every_row() -> None:
    encoder = make().double()
    states = encoder(["red ball blue star", "blue ball red star", "red ball blue box", ""])
    for other in (1, 2, 3):
        assert ((states[0, :7] - states[other, :7]).abs().amax(-1) > 1e-6).all()


def test_padding_is_not_attended() -> None:
    encoder = make().double()
    before = encoder(["red ball", "", "star"])
    with torch.no_grad():
        encoder.words.weight[0] = 37.0
        encoder.positions[2:] = -5.0
    torch.testing.assert_close(encoder(["red ball", "", "star"]), before, rtol=0, atol=0)


def test_the_empty_caption_is_learned_and_every_step_touches_the_same_parameters() -> None:
    """A parameter that only some steps use would make the ranks of a sharded run disagree on what to reduce."""
    encoder = make()
    encoder([""]).square().sum().backward()
    assert encoder.words.weight.grad is not None and encoder.words.weight.grad[EMPTY].abs().max() > 0
    assert all(p.grad is not None for p in encoder.parameters())
    encoder.zero_grad(set_to_none=True)
    encoder(["red ball"]).square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    assert encoder.words.weight.grad is not None and encoder.words.weight.grad[EMPTY].abs().max() == 0


def test_autocast_gives_full_precision_states_near_the_exact_ones() -> None:
    encoder = make()
    exact = encoder(["a red ball", ""])
    with torch.autocast("cpu", torch.bfloat16):
        rough = encoder(["a red ball", ""])
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.05 * exact.std()


@pytest.mark.parametrize("slots", [0, 2])
def test_file_round_trip(tmp_path: Path, slots: int) -> None:
    encoder = make(3, slots=slots)
    path = encoder.save(tmp_path / "text.safetensors", metadata={"recipe": "test"})
    again = CaptionEncoder.from_single_file(path)
    assert again.config == encoder.config and again.text_len == 8 + slots
    assert torch.equal(again(["a red ball", ""]), encoder(["a red ball", ""]))
    assert CaptionEncoder.from_single_file(path, dtype=torch.float64)(["red"]).dtype == torch.float64
    assert torch.equal(copy.deepcopy(again)(["red"]), again(["red"]))


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = save_file({"words.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected a CaptionEncoder"):
        CaptionEncoder.from_single_file(path)
    with pytest.raises(FileNotFoundError):
        CaptionEncoder.from_single_file(tmp_path / "none.safetensors")


def test_the_default_size_is_about_a_million_parameters() -> None:
    encoder = CaptionEncoder(CaptionConfig(words=tuple(f"w{i}" for i in range(150)), slots=4))
    assert 0.9e6 < sum(p.numel() for p in encoder.parameters()) < 1.1e6


def test_config() -> None:
    config = make().config
    assert from_dict(CaptionConfig, to_dict(config)) == config
    assert apply_overrides(config, ["layers=4", "rows=40"]).text_len == 43
    for change in (["layers=0"], ["slots=-1"], ["heads=5"], ["words=red,Blue"], ["words=red,red"], ["words=()"],
                   ["ffn_dim=0"]):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            apply_overrides(config, change)
    with pytest.raises(ValueError, match="list of captions"):
        make()("a red ball")
