"""The page: self-contained, well-formed, with the right figures."""

import html.parser
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from tokenflow_jax.train import curves, explained, report


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
        writer.scalars(step, {"loss/total": 1 / step, "perf/steps_per_second": step, "lr": step})
        writer.images(step, {"recon": np.full((4, 6, 3), step, np.uint8)})
    for step in (40, 50):
        writer.scalars(step, {"eval/psnr": step / 100 + 22.956})
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


def test_constant_curves_are_named_instead_of_drawn(tmp_path):
    history = [
        {"step": step, "loss/total": 1 / step, "loss/perceptual": 0.0, "usage/all": 0.5}
        for step in (10, 20)
    ]
    page = report.write_report(tmp_path, [*history, {"step": 20, "eval/knn": 0.25}], {}, {})
    page = page.read_text()
    assert page.count("<svg") == 1
    assert "loss/perceptual = 0." in page and "usage/all = 50 %." in page
    assert "eval/knn" in page and ">0.25<" in page  # a card and a row, but no chart of one point


def test_each_group_says_what_to_look_for_in_units(tmp_path):
    writer = curves.Writer(tmp_path)
    for step in (10, 20):
        writer.images(step, {"samples": np.zeros((4, 6, 3), np.uint8)})
    writer.close()
    history = [
        {"step": step, "loss/total": 1 / step, "eval/psnr": 20 + step, "eval/accuracy": step / 100}
        for step in (10, 20)
    ]
    config = {"eval": {"prompts": ["red <apple>", "猫"]}}
    page = report.write_report(tmp_path, history, {}, config).read_text()
    for text in (explained.GRIDS["samples"], *map(explained.SECTIONS.get, ("Losses",))):
        assert page.count(text) == 1
    assert page.count("“red &lt;apple&gt;”, “猫”") == 1  # of the last pictures alone
    assert "<b>40 dB</b>" in page and "<b>20 %</b>" in page
    assert "eval/accuracy <small>%</small>" in page and ">20</text>" in page


@pytest.mark.parametrize("name", [name for name, *_ in report._SECTIONS])
def test_every_section_is_explained(name):
    assert name in explained.SECTIONS


@pytest.mark.parametrize(
    "name,value,text",
    [
        ("eval/psnr", 23.456, "23.46 dB"),
        ("eval/codes_used/scale_1", 0.998, "99.8 %"),
        ("eval/top10_unseen", 0.3203, "32.03 %"),
        ("eval/exact_match_other_images", 0.1709, "17.09 %"),
        ("eval/rank_unseen", 34.5, "34.5"),
        ("eval/images", 158.0, "158"),
        ("eval/loss", 6.6, "6.6 nats"),
        ("scale/loss_8", 2.5, "2.5 nats"),
        ("loss/reconstruction", 0.02, "0.02"),
        ("perf/tokens_per_second", 17790.4, "17,790 tokens/s"),
        ("perf/step_seconds_p50", 0.17, "0.17 s"),
        ("perf/data_wait_fraction", 0.0016, "0.16 %"),
        ("perplexity/all", 1781.0, "1781 codes"),
    ],
)
def test_values_have_units(name, value, text):
    assert explained.quantity(name, value) == text
