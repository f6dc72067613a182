"""Slots that tell what a caption states."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from unspool.data.batch import Batch, ParsedBatch
from unspool.methods.base import Method
from unspool.methods.parsing import CaptionParsing, CaptionParsingConfig
from unspool.models.caption import CaptionConfig, CaptionEncoder

COLOURS, SHAPES = ("red", "blue", "green"), ("ball", "box")
RNG = torch.Generator()


def make(slots: int = 2) -> CaptionParsing:
    torch.manual_seed(0)
    sizes = CaptionConfig(words=(*COLOURS, *SHAPES, "and"), dim=32, out_dim=16, layers=2, rows=6, slots=slots)
    return CaptionParsing(CaptionParsingConfig(classes=(3, 2)), text=CaptionEncoder(sizes))


def everything() -> ParsedBatch:
    """Every caption of one or two things, with its labels by order of mention."""
    things = [(c, s) for c in range(3) for s in range(2)]
    said = [*((a,) for a in things), *itertools.product(things, things)]
    captions = [" and ".join(f"{COLOURS[c]} {SHAPES[s]}" for c, s in scene) for scene in said]
    labels = [[*scene, *[(-1, -1)] * (2 - len(scene))] for scene in said]
    return ParsedBatch(captions=tuple((c,) for c in captions), labels=torch.tensor(labels))


def test_it_learns_which_colour_belongs_to_which_shape() -> None:
    method, batch = make(), everything()
    optimizer = torch.optim.AdamW(method.networks["student"].parameters(), lr=1e-2)
    for step in range(80):
        optimizer.zero_grad()
        result = method.step(batch, "student", step, RNG)
        result.loss.backward()
        optimizer.step()
    metrics = method.step(batch, "student", 80, RNG).metrics
    assert float(metrics["accuracy_captions"]) > 0.95
    assert float(metrics["accuracy_stated"]) >= float(metrics["accuracy_captions"])


def test_loss_and_metrics_equal_plain_loops() -> None:
    method, batch = make(), everything()
    assert isinstance(method, Method) and method.roles(3) == ("student",)
    result = method.step(batch, "student", 0, RNG)
    parser = method.networks["student"]
    assert batch.captions is not None and batch.labels is not None
    scores = [s.detach() for s in parser([c for (c,) in batch.captions])]
    losses, right = [], []
    for sample, slot, attribute in itertools.product(range(len(batch)), range(2), range(2)):
        label = int(batch.labels[sample, slot, attribute])
        row = scores[attribute][sample, slot]
        label = len(row) - 1 if label < 0 else label
        losses.append((attribute, -float(F.log_softmax(row, 0)[label])))
        right.append(int(row.argmax()) == label)
    assert math.isclose(result.loss.item(), sum(v for _, v in losses) / len(losses), rel_tol=1e-5)
    assert math.isclose(float(result.metrics["accuracy"]), sum(right) / len(right), rel_tol=1e-5)


def test_checkpoint_keys() -> None:
    keys = {name.partition(".")[0] for name in make().networks["student"].state_dict()}
    assert keys == {"text", "heads"}


def test_bad_batches_are_refused() -> None:
    method, good = make(), everything()
    assert good.labels is not None and good.captions is not None
    bad = [
        (Batch(captions=good.captions), "labels"),
        (ParsedBatch(captions=good.captions), "labels"),
        (ParsedBatch(labels=good.labels), "captions"),
        (ParsedBatch(captions=good.captions, labels=good.labels[:, :1]), "expected"),
        (ParsedBatch(captions=good.captions, labels=good.labels.int()), "int64"),
        (ParsedBatch(captions=good.captions, labels=good.labels + 2), "below the classes"),
        (ParsedBatch(captions=good.captions, labels=good.labels - 1), "absent"),
        (ParsedBatch(captions=(("a", "b"),) * len(good), labels=good.labels), "one caption"),
    ]
    for batch, match in bad:
        with pytest.raises(ValueError, match=match):
            method.step(batch, "student", 0, RNG)
    with pytest.raises(ValueError, match="role"):
        method.step(good, "critic", 0, RNG)
    with pytest.raises(ValueError, match="slots"):
        make(slots=0)
    with pytest.raises(ValueError, match="classes"):
        CaptionParsingConfig(classes=(3, 0))
