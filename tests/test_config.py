"""Typed configuration: text and plain data become exactly the annotated types, or a message that names the key."""

from __future__ import annotations

import dataclasses
import enum
import json
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unspool import config as cfg


class Kind(enum.Enum):
    SMALL = "small"
    LARGE = "large"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    window: int
    sink: int = 0

    def __post_init__(self) -> None:
        if self.sink >= self.window:
            raise ValueError(f"sink={self.sink} must be smaller than window={self.window}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full:
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    layers: int = 2
    eps: float = 1e-6
    name: str = "tiny"
    is_causal: bool = True
    patch: tuple[int, int, int] = (1, 2, 2)
    sigmas: tuple[float, ...] = (1.0, 0.5)
    dtype: Literal["bf16", "fp32"] = "fp32"
    level: Literal[1, 2] = 1
    kind: Kind = Kind.SMALL
    path: Path | None = None
    limit: int | Literal["full"] | None = None
    tags: dict[str, float] = dataclasses.field(default_factory=dict)
    pairs: list[tuple[int, int]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    model: Model = dataclasses.field(default_factory=Model)
    see: Full | Window = dataclasses.field(default_factory=Full)
    cache: Window | None = None
    seed: int = 0


def set_one(override: str) -> Model:
    return cfg.apply_overrides(Run(), [f"model.{override}"]).model


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("layers=8", "layers", 8),
        ("layers=1_000", "layers", 1000),
        ("eps=1e-5", "eps", 1e-5),
        ("eps=3", "eps", 3.0),
        ("name=none", "name", "none"),
        ("name=a=b.c", "name", "a=b.c"),
        ("name=", "name", ""),
        ("is_causal=false", "is_causal", False),
        ("is_causal=ON", "is_causal", True),
        ("patch=1,4,4", "patch", (1, 4, 4)),
        ("patch=(1, 4, 4)", "patch", (1, 4, 4)),
        ("sigmas=[1,0.75,0]", "sigmas", (1.0, 0.75, 0.0)),
        ("sigmas=1", "sigmas", (1.0,)),
        ("sigmas=[]", "sigmas", ()),
        ("dtype=bf16", "dtype", "bf16"),
        ("level=2", "level", 2),
        ("kind=large", "kind", Kind.LARGE),
        ("path=a/b.c", "path", Path("a/b.c")),
        ("path=None", "path", None),
        ("limit=21", "limit", 21),
        ("limit=full", "limit", "full"),
        ("limit=none", "limit", None),
        ("pairs=[[1,2],[3,4]]", "pairs", [(1, 2), (3, 4)]),
    ],
)
def test_overrides_take_the_annotated_type(override: str, field: str, value: object) -> None:
    got = getattr(set_one(override), field)
    assert got == value and type(got) is type(value)
    if isinstance(value, tuple):
        assert [type(item) for item in got] == [type(item) for item in value]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("layers=2.5", "model.layers: got '2.5', expected int"),
        ("layers=true", "model.layers: got 'true', expected int"),
        ("is_causal=2", "model.is_causal: got '2', expected bool"),
        ("eps=small", "model.eps: got 'small', expected float"),
        ("patch=1,2", "expected 3"),
        ("patch=1,x,2", r"model.patch\[1\]: got 'x', expected int"),
        ("dtype=fp16", "one of 'bf16', 'fp32'"),
        ("level=3", "one of 1, 2"),
        ("kind=medium", "model.kind"),
        ("limit=ful", "int or one of 'full' or none"),
        ("layer=3", "model.layer: unknown key; did you mean layers"),
        ("layers.x=3", "model.layers: is 2, which has no fields"),
        ("layers", "expected key=value"),
        (".x=1", "expected key=value"),
    ],
)
def test_bad_overrides_name_the_key_and_the_expectation(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        set_one(override)


def test_overrides_leave_the_original_and_the_rest_alone() -> None:
    before = Run()
    after = cfg.apply_overrides(before, ["model.layers=5", "seed=1", "seed=2"])
    assert before == Run()
    assert after == Run(model=Model(layers=5), seed=2)


def test_overrides_of_one_dataclass_are_validated_together() -> None:
    """Applied one by one, sink=9 alone would be refused beside the old window of 3."""
    run = Run(cache=Window(window=3))
    assert cfg.apply_overrides(run, ["cache.sink=9", "cache.window=12"]).cache == Window(window=12, sink=9)
    with pytest.raises(ValueError, match="sink=9 must be smaller"):
        cfg.apply_overrides(run, ["cache.sink=9"])
    assert cfg.apply_overrides(run, ["cache=none"]).cache is None
    with pytest.raises(ValueError, match="set the fields of Window or none one by one"):
        cfg.apply_overrides(run, ["cache=3"])
    assert cfg.apply_overrides(Run(), ["cache.window=3"]).cache == Window(window=3), "the first fields make it"
    with pytest.raises(ValueError, match=r"Window also needs cache\.window"):
        cfg.apply_overrides(Run(), ["cache.sink=1"])
    with pytest.raises(ValueError, match="has no fields to set"):
        cfg.apply_overrides(Run(), ["seed.window=3"])


@pytest.mark.parametrize("items", [["cache=none", "cache.window=3"], ["cache.window=3", "cache=none"]])
def test_a_key_is_set_as_a_whole_or_by_its_fields_but_not_both(items: list[str]) -> None:
    with pytest.raises(ValueError, match="already set"):
        cfg.apply_overrides(Run(cache=Window(window=3)), items)


models = st.builds(
    Model,
    layers=st.integers(),
    eps=st.floats(allow_nan=False),
    name=st.text(),
    is_causal=st.booleans(),
    patch=st.tuples(st.integers(), st.integers(), st.integers()),
    sigmas=st.lists(st.floats(allow_nan=False)).map(tuple),
    dtype=st.sampled_from(["bf16", "fp32"]),
    kind=st.sampled_from(Kind),
    path=st.none() | st.sampled_from([Path("a"), Path("/b/c")]),
    limit=st.none() | st.integers() | st.just("full"),
    tags=st.dictionaries(st.text(), st.floats(allow_nan=False)),
    pairs=st.lists(st.tuples(st.integers(), st.integers())),
)
windows = st.integers(1, 30).flatmap(lambda n: st.builds(Window, window=st.just(n), sink=st.integers(0, n - 1)))
runs = st.builds(Run, model=models, see=windows | st.just(Full()), cache=st.none() | windows, seed=st.integers())


@settings(deadline=None)
@given(runs)
@example(Run(model=Model(name="\x85", tags={"\u2028": 1e16}, limit="full")))  # PyYAML loses these letters unescaped
def test_round_trip_through_plain_data_json_and_yaml(run: Run) -> None:
    data = cfg.to_dict(run)
    assert cfg.from_dict(Run, data) == run
    assert cfg.from_dict(Run, json.loads(json.dumps(data))) == run
    assert cfg.from_dict(Run, cfg.yaml.safe_load(cfg.to_yaml(run))) == run


def test_a_union_of_dataclasses_keeps_the_class() -> None:
    data = cfg.to_dict(Run(see=Window(window=4)))
    assert data["see"] == {"_type": "Window", "window": 4, "sink": 0}
    del data["see"]["_type"]
    with pytest.raises(ValueError, match="_type is None, expected one of Full, Window"):
        cfg.from_dict(Run, data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"model": {"layrs": 3}}, "model.layrs: unknown key; did you mean layers"),
        ({"zzz": 3}, "zzz: unknown key; known: model, see, cache, seed"),
        ({"model": {"layers": "3"}}, "model.layers: got '3', expected int"),
        ({"model": {"layers": True}}, "model.layers: got True, expected int"),
        ({"model": {"is_causal": 1}}, "model.is_causal: got 1, expected bool"),
        ({"model": {"patch": [1, 2]}}, "model.patch: got 2 values"),
        ({"model": {"patch": "122"}}, "model.patch: got '122'"),
        ({"model": {"tags": {"a": "x"}}}, "model.tags.a: got 'x', expected float"),
        ({"model": 3}, "model: got 3, expected a mapping"),
        ({"cache": {}}, "cache: missing window"),
        ({"cache": {"window": 1, "sink": 2}}, "sink=2 must be smaller"),
        ({"seed": None}, "seed: got None, expected int"),
    ],
)
def test_bad_data_names_the_key_and_the_expectation(data: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cfg.from_dict(Run, data)


def test_yaml_files(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model:\n  eps: 1e-5\n  patch: [1, 4, 4]\n")  # YAML 1.1 reads 1e-5 as text
    assert cfg.load_yaml(Run, path) == Run(model=Model(eps=1e-5, patch=(1, 4, 4)))
    path.write_text("")
    assert cfg.load_yaml(Run, path) == Run()
    path.write_text("model: [")
    with pytest.raises(ValueError, match=r"run\.yaml: not valid YAML"):
        cfg.load_yaml(Run, path)
    path.write_text("modell: {}")
    with pytest.raises(ValueError, match=r"run\.yaml: modell: unknown key; did you mean model"):
        cfg.load_yaml(Run, path)
    with pytest.raises(FileNotFoundError, match="no such configuration file"):
        cfg.load_yaml(Run, tmp_path / "none.yaml")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
    window: int
    length: int = 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    see: Full | Window | Sampled = dataclasses.field(default_factory=lambda: Window(window=5, sink=2))


def test_a_class_of_a_union_is_chosen_by_its_name() -> None:
    assert cfg.apply_overrides(Choice(), ["see=Full"]).see == Full()
    assert cfg.apply_overrides(Choice(), ["see=Sampled"]).see == Sampled(window=5)  # what both have is kept
    assert cfg.apply_overrides(Choice(), ["see._type=Sampled", "see.length=3"]).see == Sampled(window=5, length=3)
    assert cfg.apply_overrides(Choice(see=Full()), ["see._type=Window", "see.window=4"]).see == Window(window=4)
    for wrong, match in (
        (["see._type=Other"], "expected one of Full, Window, Sampled"),
        (["see._type=Sampled", "see.sink=1"], "see.sink"),
        (["see.sink=7"], "sink=7"),
    ):
        with pytest.raises(ValueError, match=match):
            cfg.apply_overrides(Choice(), wrong)
    with pytest.raises(ValueError, match=r"Window also needs see\.window"):
        cfg.apply_overrides(Choice(see=Full()), ["see=Window"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    moving: bool = True
    length: int = 9
    see: Full | Window | Sampled = dataclasses.field(default_factory=Full)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    moving: bool = False
    length: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    how: Shown | Kept = dataclasses.field(default_factory=Kept)


def test_of_another_class_only_what_was_set_is_kept() -> None:
    assert cfg.apply_overrides(Choices(), ["how=Shown"]).how == Shown()
    assert cfg.apply_overrides(Choices(how=Kept(length=5)), ["how=Shown"]).how == Shown(length=5)
    assert cfg.apply_overrides(Choices(how=Shown(moving=False)), ["how=Kept"]).how == Kept()
    assert cfg.apply_overrides(Choices(how=Kept(moving=True, length=2)), ["how=Kept"]).how == Kept(moving=True)


def test_a_chosen_class_may_choose_in_turn() -> None:
    nested = ["how._type=Shown", "how.see._type=Window", "how.see.window=4"]
    assert cfg.apply_overrides(Choices(), nested).how == Shown(see=Window(window=4))
    by_name = ["how._type=Shown", "how.see=Sampled"]
    with pytest.raises(ValueError, match=r"Sampled also needs how\.see\.window"):
        cfg.apply_overrides(Choices(), by_name)
    assert cfg.apply_overrides(Choices(how=Shown(see=Window(window=3))), by_name).how == Shown(see=Sampled(window=3))


class Loose:
    pass


@dataclasses.dataclass(frozen=True)
class Held:
    parts: tuple[object, ...] = (1, Loose())


@dataclasses.dataclass(frozen=True)
class Outer:
    held: Held = dataclasses.field(default_factory=Held)


def test_what_is_no_plain_data_is_refused_by_its_key() -> None:
    with pytest.raises(ValueError, match=r"held\.parts\.1: got <.*; to be kept, Loose must be a frozen dataclass"):
        cfg.to_dict(Outer())
