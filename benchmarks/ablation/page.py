"""The page of the ablations, as HTML and Markdown, from the raw results of all runs."""

import base64
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from benchmarks import matrix
from benchmarks.ablation.claims import CLAIMS, Verdict, decide
from tokenflow_jax.train import report

# Columns of each suite's table: head, name of the figure, factor, form.
_TOKENIZERS = (
    ("bits", "bits", 1, "{:.0f}"),
    ("parameters, M", "parameters", 1e-6, "{:.2f}"),
    ("rFID", "rfid", 1, "{:.1f}"),
    ("PSNR, dB", "psnr", 1, "{:.2f}"),
    ("LPIPS", "lpips", 1, "{:.3f}"),
    ("k-NN semantic, %", "knn_semantic", 100, "{:.1f}"),
    ("k-NN pixel, %", "knn_pixel", 100, "{:.1f}"),
    ("codes used, %", "codes_used", 100, "{:.1f}"),
    ("perplexity", "perplexity", 1, "{:.0f}"),
    ("ms per step", "perf/step_seconds_p50", 1000, "{:.0f}"),
    ("memory, GB", "memory_gb", 1, "{:.2f}"),
)
_COLUMNS = {
    "paper": _TOKENIZERS,
    "quantizers": _TOKENIZERS,
    "understanding": (
        ("kinds named, %", "exact_match", 100, "{:.1f}"),
        ("pictures exchanged, %", "exact_match_other_images", 100, "{:.1f}"),
        ("loss", "loss", 1, "{:.3f}"),
        ("ms per step", "perf/step_seconds_p50", 1000, "{:.0f}"),
    ),
    "sampling": (
        ("in ten, %", "top10", 100, "{:.1f}"),
        ("median place", "rank", 1, "{:.0f}"),
        ("in ten by Inception, %", "top10_inception", 100, "{:.1f}"),
    ),
}
_CURVES = {"paper": "eval/psnr", "quantizers": "eval/psnr", "understanding": "eval/exact_match"}

Rows = Mapping[str, Sequence[Mapping[str, float]]]


def write(out: Path) -> list[Path]:
    """Write OUT/ablation.html and ablation.md; return their paths."""
    results = [json.loads(path.read_text()) for path in sorted((out / "results").glob("*.json"))]
    suites: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    budgets = defaultdict(set)
    for one in results:
        suites[one["suite"]][one["row"]].append(one["figures"])
        budgets[one["suite"]].add(one["budget"])
    text, body = ["# Ablations", ""], ["<h1>Ablations</h1>"]
    for suite in filter(suites.__contains__, CLAIMS):
        title = f"{suite.capitalize()}, budget {', '.join(sorted(budgets[suite]))}"
        head, cells = _table(suite, suites[suite])
        said = [_sentence(claim, decide(claim, suites[suite])) for claim in CLAIMS[suite]]
        text += [f"## {title}", "", matrix.table(head, cells), "", *(f"- {s}" for s in said), ""]
        body += [f"<h2>{escape(title)}</h2>", _html(head, cells)]
        body += ["<ul>", *(f"<li>{escape(sentence)}</li>" for sentence in said), "</ul>"]
        body.append(_pictures(out / suite, suite, list(suites[suite])))
    paths = [out / "ablation.html", out / "ablation.md"]
    paths[0].write_text(report.page("Ablations", "".join(body)), encoding="utf-8")
    paths[1].write_text("\n".join(text), encoding="utf-8")
    return paths


def _table(suite: str, rows: Rows) -> tuple[list[str], list[list[str]]]:
    columns = [
        c for c in _COLUMNS[suite] if any(c[1] in run for own in rows.values() for run in own)
    ]
    cells = []
    for name, runs in rows.items():
        line = [name, str(len(runs))]
        for _, key, times, form in columns:
            line.append(matrix.spread([run.get(key) for run in runs], form, times))
        cells.append(line)
    return ["row", "n", *(column[0] for column in columns)], cells


def _sentence(claim, verdict: Verdict) -> str:
    text = f"{claim.text} ({claim.source}): {verdict.words}."
    if verdict.half_width == verdict.half_width:
        sign = "" if claim.sign > 0 else ", smaller is better"
        text += (
            f" {claim.figure} of {claim.better} against {claim.worse}: "
            f"{verdict.difference:+.3g} ± {verdict.half_width:.2g} towards the claim{sign}."
        )
    return text


def _html(head: list[str], cells: list[list[str]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = (
        "<tr><th>{}</th>{}</tr>".format(
            escape(line[0]), "".join(f'<td class="number">{escape(cell)}</td>' for cell in line[1:])
        )
        for line in cells
    )
    return f"<table><tr>{top}</tr>{''.join(lines)}</table>"


def _pictures(folder: Path, suite: str, rows: list[str]) -> str:
    """Return curves, and grids of reconstructions, of the rows' first seed."""
    charts, grids = [], []
    for row in rows:
        workdir = folder / f"{row}_0"
        if not (workdir / "metrics.jsonl").exists():
            continue
        name = _CURVES[suite]
        points = report.collect_curves(matrix.history(workdir)).get(name)
        if points:
            charts.append(report.chart(f"{row}: {name.removeprefix('eval/')}", points))
        for path in sorted((workdir / "images").glob("reconstruction_*.png"))[-1:]:
            data = base64.b64encode(path.read_bytes()).decode()
            grids.append(
                f'<figure class="grid"><figcaption>{escape(row)} <small>held-out pictures above, '
                f'reconstructions below</small></figcaption><img alt="{escape(row)}" '
                f'src="data:image/png;base64,{data}"></figure>'
            )
    return f'<div class="charts">{"".join(charts)}</div>{"".join(grids)}'
