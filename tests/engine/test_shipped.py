"""The models in the package: each is whole, says where it comes from, and streams."""

from __future__ import annotations

import numpy as np
import pytest

from unspool.engine.load import load
from unspool.engine.shipped import shipped_models
from unspool.recipes import RECIPES


def test_what_the_documents_name_is_there() -> None:
    assert {"stage", "ca2vdm-stage"} <= set(shipped_models())


@pytest.mark.parametrize("name", sorted(shipped_models()))
def test_a_model_of_the_package_streams(name: str) -> None:
    """Two steps instead of the model's: it is whether it runs, not how well, that is asked here."""
    model = load(name)
    spec = model.spec
    assert spec.is_causal and spec.licence == "Apache-2.0" and spec.about and spec.examples
    assert spec.provenance["recipe"] in RECIPES
    session = model.session(spec.examples[0], steps=2)
    first, second = session.next_chunk(), session.next_chunk()
    assert first.shape[1:] == second.shape[1:] == (spec.height_px, spec.width_px, 3) and first.dtype == np.uint8
    assert len(second) == 4 * spec.rollout.chunk
    assert second.std() > 5 and np.abs(np.diff(second.astype(int), axis=0)).max() > 0
