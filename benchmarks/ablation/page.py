"""The page of the ablations, as HTML and Markdown, from the raw results of all runs."""

import base64
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from benchmarks import matrix
from benchmarks.ablation.claims import CLAIMS, Verdict, decide
from benchmarks.ablation.suites import RECIPES
from benchmarks.ablation.suites import rows as all_rows
from tokenflow_jax.evals.pictures import labelled_grid, write_png
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
)
_COLUMNS = {
    "paper": _TOKENIZERS,
    "quantizers": _TOKENIZERS,
    "understanding": (
        ("kinds named, %", "exact_match", 100, "{:.1f}"),
        ("pictures exchanged, %", "exact_match_other_images", 100, "{:.1f}"),
        ("loss", "loss", 1, "{:.3f}"),
    ),
    "sampling": (
        ("in ten, %", "top10", 100, "{:.1f}"),
        ("median place", "rank", 1, "{:.0f}"),
        ("in ten by Inception, %", "top10_inception", 100, "{:.1f}"),
    ),
}
_CURVES = {"paper": "eval/psnr", "quantizers": "eval/psnr", "understanding": "eval/exact_match"}

Rows = Mapping[str, Sequence[Mapping[str, float]]]

_RULE = (
    "Each figure is the mean ± standard deviation of n seeds. A claim is decided by Welch's t-test "
    "of its two rows, two-sided, at 5 %; claims and rule were committed before the first run "
    "(benchmarks/ablation/claims.py). The interval behind a difference is its 95 % interval."
)
_SHOWN = 8  # pictures in a row


def write(out: Path) -> list[Path]:
    """Write OUT's ablation.html, ablation.md and a picture per suite; return their paths.

    Without the runs themselves the pictures that are there stay.
    """
    suites: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    budgets, curves = defaultdict(set), {}
    for one in results(out):
        suites[one["suite"]][one["row"]].append(one["figures"])
        budgets[one["suite"]].add(one["budget"])
        if one["seed"] == 0 and one["curve"]:
            curves[one["suite"], one["row"]] = one["curve"]
    if not suites:
        raise SystemExit(f"{out} has no results: run the suites first")
    text, body = ["# Ablations", "", _RULE, ""], [f"<h1>Ablations</h1><p>{escape(_RULE)}</p>"]
    paths = [out / "ablation.html", out / "ablation.md"]
    for suite in filter(suites.__contains__, CLAIMS):
        title = f"{suite.capitalize()}, budget {', '.join(sorted(budgets[suite]))}"
        rows = _in_order(suite, suites[suite])
        said = [_sentence(claim, decide(claim, rows)) for claim in CLAIMS[suite]]
        tables = [_table(suite, rows, out), *_scale_tables(rows)]
        text += [f"## {title}", "", *(line for t in tables for line in (matrix.table(*t), ""))]
        text += [*(f"- {sentence}" for sentence in said), ""]
        body += [f"<h2>{escape(title)}</h2>", *(_html(*t) for t in tables)]
        body += ["<ul>", *(f"<li>{escape(sentence)}</li>" for sentence in said), "</ul>"]
        charts = [
            report.chart(f"{row}: {_CURVES[suite].removeprefix('eval/')}", curves[suite, row])
            for row in rows
            if (suite, row) in curves
        ]
        body.append(f'<div class="charts">{"".join(charts)}</div>')
        path = out / f"{suite}.png"
        drawn = _pictures(out / suite, list(rows)) if suite in ("paper", "quantizers") else None
        if drawn is not None:
            write_png(drawn, path)
        if path.exists():
            paths.append(path)
            caption = "Held-out pictures, and their reconstructions by the first seed of each row"
            data = base64.b64encode(path.read_bytes()).decode()
            image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
            body.append(f'<figure class="grid"><figcaption>{caption}</figcaption>{image}</figure>')
            text += [f"![{caption}]({suite}.png)", ""]
    paths[0].write_text(report.page("Ablations", "".join(body)), encoding="utf-8")
    paths[1].write_text("\n".join(text), encoding="utf-8")
    return paths


def keep(
    out: Path, suite: str, row: str, seed: int, budget: str, figures: Mapping[str, float]
) -> None:
    """Add the raw figures of a finished run, and its curve, to OUT's results.jsonl."""
    curve = []
    if suite in _CURVES:
        known = report.collect_curves(matrix.history(out / suite / f"{row}_{seed}"))
        curve = known.get(_CURVES[suite], [])
    line = {"suite": suite, "row": row, "seed": seed, "budget": budget, "figures": figures}
    with open(out / "results.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "curve": curve}, sort_keys=True) + "\n")


def results(out: Path) -> list[dict]:
    """Return the lines of OUT's results.jsonl, by suite, row and seed."""
    path = out / "results.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = map(json.loads, text.splitlines())
    return sorted(found, key=lambda one: (one["suite"], one["row"], one["seed"]))


def _in_order(suite: str, rows: Rows) -> Rows:
    """Return the rows as `suites` lists them."""
    names = [run.name for run in all_rows(suite, "2h", data={}, tokenizer="")]
    order = list(RECIPES) if suite == "sampling" else names
    return {name: rows[name] for name in sorted(rows, key=order.index)}


def _table(suite: str, rows: Rows, out: Path) -> tuple[list[str], list[list[str]]]:
    columns = [
        c for c in _COLUMNS[suite] if any(_value(run, c[1]) for own in rows.values() for run in own)
    ]
    cells = []
    for name, runs in rows.items():
        line = [name, str(len(runs))]
        for _, key, factor, form in columns:
            line.append(matrix.spread([_value(run, key) for run in runs], form, factor))
        cells.append(line)
    head = ["row", "n", *(column[0] for column in columns)]
    measured = out / f"{suite}_costs.json"
    if measured.exists():
        found = json.loads(measured.read_text())
        head += ["ms per step", "its memory, GB"]
        for line in cells:
            own = found.get(line[0])
            line += [f"{own['step_ms']:.0f}", f"{own['memory_gb']:.3f}"] if own else ["", ""]
    return head, cells


def _value(run: Mapping[str, float], key: str) -> float | None:
    """Return a figure; of several indices in a code, the mean of theirs."""
    name, _, scale = key.partition("/scale_")
    if key in run or not name.startswith(("codes_used", "perplexity")):
        return run.get(key)
    ending = f"/scale_{scale}" if scale else ""
    pattern = re.compile(rf"{name}/(?!scale_|all)\w+{ending}")
    found = [value for other, value in run.items() if pattern.fullmatch(other)]
    return sum(found) / len(found) if found else None


def _scale_tables(rows: Rows) -> list[tuple[list[str], list[list[str]]]]:
    """Return a table of the codes used and the perplexity of each scale, of tokenizers."""
    every = [run for own in rows.values() for run in own]
    found = {int(m[1]) for run in every for key in run if (m := re.search(r"/scale_(\d+)$", key))}
    if not any("psnr" in run for run in every) or not found:
        return []
    cells = []
    for name, runs in rows.items():
        line = [name]
        for side in sorted(found):
            used = [_value(run, f"codes_used/scale_{side}") for run in runs]
            even = [_value(run, f"perplexity/scale_{side}") for run in runs]
            spread = matrix.spread(even, "{:.0f}", 1)
            line.append(f"{matrix.spread(used)} %; {spread}" if spread else "")
        cells.append(line)
    head = ["codes used; perplexity", *(f"{side} x {side}" for side in sorted(found))]
    return [(head, cells)]


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
    return f"<p><table><tr>{top}</tr>{''.join(lines)}</table></p>"


def _pictures(folder: Path, rows: list[str]) -> np.ndarray | None:
    """Return held-out pictures above their reconstructions by each row's first seed."""
    strips = {}
    for row in rows:
        run = folder / f"{row}_0"
        if not (run / "checkpoints").is_dir():
            continue
        kept = run / "reconstructed.npy"
        if not kept.exists():
            _reconstruct(run, kept)
        strips["original"], strips[row] = np.load(kept)
    return labelled_grid(list(strips.values()), list(strips)) if strips else None


def _reconstruct(run: Path, kept: Path) -> None:
    """Write the first held-out pictures and what a run's tokenizer makes of them."""
    from tokenflow_jax.data import pipeline
    from tokenflow_jax.tokenizer.api import Tokenizer

    tokenizer = Tokenizer.load(run)
    data, size = tokenizer.trained.saved["data"], tokenizer.config.image_size
    config = pipeline.DataConfig(
        data["name"], data["path"], data["eval_split"], size, "center", flip=False
    )
    batch = next(iter(pipeline.eval_batches(config, batch_size=_SHOWN, limit=_SHOWN)))
    made = tokenizer.reconstruct(list(batch["image"]))
    np.save(kept, np.stack([batch["image"], np.stack([np.asarray(one) for one in made])]))
