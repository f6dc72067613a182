"""What a stream scores that has stopped: the row that a drift is read against."""

from __future__ import annotations

import numpy as np

from unspool.data.worlds.stage import Scene
from unspool.evaluate.measures import Format, Values, measure_stream


def measure_frozen_stream(scene: Scene, segment: int, num_frames: int, form: Format) -> Values:
    """`measure_stream` of the truth, standing still from the first frame of each segment on: what a stream scores that
    has stopped there."""
    truth = form.render(scene, num_frames)
    return measure_stream(truth[np.arange(num_frames) // segment * segment], scene, segment, num_frames, form)
