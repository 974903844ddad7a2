"""Names above the plot of a plan."""

import pytest

from pipeline.report.plots import sheet
from pipeline.report.timeline import MOMENTS, mark

NAMES = [*MOMENTS, *MOMENTS]


@pytest.mark.parametrize("places", [range(0, 600, 100), (0, 150, 290, 400, 470, 560), (0, 100, 330, 350, 500, 590)])
def test_names_of_moments_do_not_touch(places):
    figure = sheet(8, 4)
    axes = figure.subplots()
    axes.set_xlim(0, 600)
    axes.plot([0, 600], [0, 1], label="optimizer state 6.74 MB")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))  # which makes the axes narrower
    mark(axes, zip(places, NAMES, strict=True))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent(figure.canvas.get_renderer()) for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == NAMES
    assert not any(box.overlaps(other) for at, box in enumerate(boxes) for other in boxes[at + 1 :])
