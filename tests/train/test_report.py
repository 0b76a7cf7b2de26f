"""The page: self-contained, well-formed, with the right figures."""

import html.parser
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from tokenflow_jax.train import curves, report


class Outline(html.parser.HTMLParser):
    """Collects what the page loads and checks that tags close."""

    VOID = ("meta", "img", "br")

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.svgs = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.sources += [v for k, v in attrs if k in ("src", "href")]
        self.svgs += tag == "svg"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_complete_and_self_contained(tmp_path):
    writer = curves.Writer(tmp_path)
    for step in range(10, 60, 10):
        writer.scalars(step, {"loss/total": 1 / step, "perf/steps_per_second": 4.0, "lr": 1e-4})
        writer.images(step, {"recon": np.full((4, 6, 3), step, np.uint8)})
    writer.scalars(50, {"eval/psnr": 23.456})
    writer.close()
    path = report.write_report(
        tmp_path,
        writer.history,
        {"stage": "tokenizer", "step": "50 of 50", "start": "scratch <b>"},
        {"model": {"scales": [1, 2]}},
        ["3 pictures skipped: a<b.png"],
    )
    page = path.read_text()
    outline = Outline()
    outline.feed(page)
    assert not outline.open
    assert outline.sources and all(s.startswith("data:image/png;base64,") for s in outline.sources)
    assert len(outline.sources) == 4  # the last grid and three earlier ones
    assert outline.svgs == 4
    assert "23.46" in page and "a&lt;b.png" in page and "scratch &lt;b&gt;" in page


@pytest.mark.parametrize(
    "points",
    [
        [(5, 1.0)],
        [(5, 0.0), (10, 0.0)],
        [(1, 3.0), (2, -1e-5)],
        [(100, 1e3), (20_000, 1e-3)],
        [(i, float(i % 7)) for i in range(5000)],
    ],
)
def test_charts_are_well_formed_and_inside_their_frame(points):
    root = ElementTree.fromstring(report.chart("a & b", points))
    curve = next(e for e in root.iter() if e.get("class") == "curve")
    xy = np.array([p.split(",") for p in curve.get("points").split()], float)
    assert len(xy) <= 400
    assert (xy[:, 0] >= 0).all() and (xy[:, 0] <= 380).all()
    assert (xy[:, 1] >= 0).all() and (xy[:, 1] <= 220).all()
    if len(points) > 1 and points[0][1] > points[-1][1]:
        assert xy[0, 1] < xy[-1, 1]  # larger values lie higher


def test_curves_leave_out_what_is_not_finite():
    history = [{"step": 1, "a": 1.0, "perf/eta_seconds": 3.0}, {"step": 2, "a": None}]
    assert report.collect_curves(history) == {"a": [(1, 1.0)]}


def test_a_run_without_anything_still_has_a_page(tmp_path):
    assert "<h1>" in report.write_report(tmp_path, [], {}, {}).read_text()
