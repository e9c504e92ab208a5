"""The picture has a bar for each action, as long as it takes, in its rank's row."""

from __future__ import annotations

import sys

import pytest

from paracomm.errors import InvalidArgument
from paracomm.pipeline import Costs, build, simulate
from paracomm.pipeline.picture import draw, figure_of

TIMELINE = simulate(build("zb-h1", ranks=3, microbatches=4), Costs(1e-3, 2e-3, 0.5e-3))
NEEDS = {"reason": "matplotlib, which pictures need, is not installed"}


def test_bars_are_the_spans():
    pytest.importorskip("matplotlib", **NEEDS)
    (axes,) = figure_of(TIMELINE).axes
    bars = [
        (round(bar.get_y() + bar.get_height() / 2), round(bar.get_x(), 9), round(bar.get_width(), 9))
        for bar in axes.patches
    ]
    spans = TIMELINE.spans
    assert bars == [(s.rank, round(s.start_s * 1e3, 9), round((s.end_s - s.start_s) * 1e3, 9)) for s in spans]
    assert [text.get_text() for text in axes.texts] == [str(span.action.microbatch) for span in spans]
    kinds = {span.action.kind: bar.get_facecolor() for span, bar in zip(spans, axes.patches, strict=True)}
    assert len(set(kinds.values())) == 3
    assert f"bubble {TIMELINE.bubble:.1%}" in axes.get_title() and axes.get_xlabel() == "ms"


@pytest.mark.parametrize(("name", "begins"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_the_ending_says_the_form(tmp_path, name, begins):
    pytest.importorskip("matplotlib", **NEEDS)
    draw(TIMELINE, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begins)


@pytest.mark.parametrize("name", ["a.pdf", "a"])
def test_other_endings_are_refused(tmp_path, name):
    with pytest.raises(InvalidArgument, match=r"expected \.png or \.svg"):
        draw(TIMELINE, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InvalidArgument, match=r"pip install 'paracomm\[plot\]'"):
        draw(TIMELINE, tmp_path / "a.png")
