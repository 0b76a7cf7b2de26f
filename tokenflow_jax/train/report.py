"""report.html: a run's curves (inline SVG), grids and figures on one self-contained page."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from etils import epath

from tokenflow_jax.train import explained
from tokenflow_jax.train.curves import grid_files
from tokenflow_jax.train.explained import number, quantity

_WIDTH, _HEIGHT = 380, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 14, 40  # margins around the plot area
_MAX_POINTS = 400
_LOG_RATIO = 30.0  # a positive curve that spans more than this is drawn on a logarithmic axis

_SECTIONS = (  # title, prefixes of the metric names
    ("Held-out figures", "eval/"),
    ("Losses", "loss/"),
    ("Gradient shares of the losses", "gradient_share"),
    ("Codebook", ("usage", "perplexity", "distance")),
    ("Throughput", "perf/"),
    ("Other curves", ""),
)

_STYLE = """
:root { color-scheme: light dark; --bg: #fbfbfa; --card: #fff; --ink: #1f2328; --soft: #6a717b;
  --line: #e2e4e8; --accent: #2f6f9f; }
@media (prefers-color-scheme: dark) { :root { --bg: #15181c; --card: #1c2026; --ink: #e4e7eb;
  --soft: #98a1ac; --line: #30363f; --accent: #79b4dd; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 32px 24px 64px; background: var(--bg);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 40px 0 12px; }
p { color: var(--soft); font-size: 13px; margin: 8px 0 0; max-width: 110ch; }
p.lead { font-size: 15px; margin: 0 0 20px; overflow-wrap: anywhere; }
.cards, .charts { display: grid; gap: 14px; }
.cards { grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); }
.card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  margin: 0; padding: 12px 14px; }
.card b { display: block; font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; }
.card span, figcaption small { color: var(--soft); font-size: 13px; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 4px; }
figure.grid { margin-bottom: 14px; }
figure.grid img { max-width: 100%; height: auto; display: block; border-radius: 4px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
svg .value { fill: var(--ink); font-weight: 600; stroke: var(--card); stroke-width: 3;
  paint-order: stroke; }
svg .rule { stroke: var(--line); stroke-width: 1; }
svg .curve { fill: none; stroke: var(--accent); stroke-width: 1.8; stroke-linejoin: round; }
svg circle { fill: var(--accent); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 3px 24px 3px 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--soft); white-space: nowrap; }
td.number { text-align: right; }
details { margin: 12px 0; } summary { cursor: pointer; color: var(--soft); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px;
  overflow-x: auto; font-size: 13px; }
"""


def write_report(
    workdir: str | epath.Path,
    history: Sequence[Mapping[str, Any]],
    facts: Mapping[str, str],
    config: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> epath.Path:
    """Write `<workdir>/report.html` and return its path.

    Grids are taken from `images/<name>_<step>.png` in the workdir, and curves from `history`, the
    lines of metrics.jsonl. `facts` are short texts by name about the run as a whole; `notes` are
    sentences that the reader must know (a term left out, pictures that were skipped).
    """
    workdir, curves = epath.Path(workdir), collect_curves(history)
    sections = _sections(curves)
    title = escape(f"{facts.get('stage', 'run')} · step {facts.get('step', '?')}")
    body = [f'<h1>{title}</h1><p class="lead">{escape(str(workdir))}</p>', _cards(curves)]
    if notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in notes)
        body.append(f"<h2>Notes</h2><ul>{items}</ul>")
    body.append(_grids(workdir / "images", _prompts(config)))
    for section, names in sections:
        body.append(_charts(section, {name: curves[name] for name in names}))
    if sections:
        head = "<tr><th></th><th>first</th><th>last</th><th>at step</th></tr>"
        rows = "".join(_figures(name, curves[name]) for _, names in sections for name in names)
        body.append(f"<h2>Figures</h2><table>{head}{rows}</table>")
    rows = (f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in facts.items())
    body.append(f"<h2>Run</h2><table>{''.join(rows)}</table>")
    text = escape(json.dumps(config, indent=2, sort_keys=True, default=str))
    body.append(f"<h2>Config</h2><details><summary>all values</summary><pre>{text}</pre></details>")
    path = workdir / "report.html"
    path.write_text(page(title, "".join(body)))
    return path


def page(title: str, body: str) -> str:
    """Return a self-contained page; both texts are HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )


def collect_curves(history: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Turn metric lines into curves: name -> points (step, value), without non-finite ones."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in history:
        for name, value in line.items():
            if name not in ("step", "perf/eta_seconds") and value is not None:
                curves.setdefault(name, []).append((line["step"], float(value)))
    return curves


def chart(name: str, points: Sequence[tuple[int, float]]) -> str:
    """Draw one curve of at least one (step, value), steps ascending, as a figure."""
    factor, unit = explained.unit(name)
    points = [(step, factor * value) for step, value in points]
    if len(points) > _MAX_POINTS:  # the first and the last stay
        last = len(points) - 1
        points = [points[round(i * last / (_MAX_POINTS - 1))] for i in range(_MAX_POINTS)]
    steps, values = [p[0] for p in points], [p[1] for p in points]
    low, high = min(values), max(values)
    is_log = low > 0 and high / low > _LOG_RATIO
    scale, find_ticks = (math.log10, _log_ticks) if is_log else (float, _ticks)
    ticks = find_ticks(low, high)
    bottom, top = scale(min(low, ticks[0])), scale(max(high, ticks[-1]))
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def x(step: float) -> float:
        return _LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        share = (scale(value) - bottom) / ((top - bottom) or 1.0)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def text(x: float, y: float, anchor: str, words: str, kind: str = "") -> str:
        return f'<text {kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'

    parts = []
    for tick in ticks:
        height = f'y1="{y(tick):.1f}" y2="{y(tick):.1f}"'
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" {height}/>')
        parts.append(text(_LEFT - 6, y(tick) + 4, "end", number(tick)))
    inner = [round(t) for t in _ticks(first, last) if first <= t <= last and t == round(t)]
    for tick in inner or [first, last]:
        label = f"{tick / 1000:g}k" if tick >= 10_000 and tick % 100 == 0 else str(tick)
        parts.append(text(x(tick), _HEIGHT - _BOTTOM + 16, "middle", label))
    parts.append(text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6, "middle", "step"))
    path = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in points)
    parts.append(f'<polyline class="curve" points="{path}"/>')
    for (step, value), anchor in ((points[0], "start"), (points[-1], "end")):
        above = y(value) - 8 if y(value) > _TOP + 14 else y(value) + 16
        parts.append(f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="3"/>')
        if len(points) > 1 or anchor == "start":
            parts.append(text(x(step), above, anchor, number(value), 'class="value"'))
    about = ", ".join([unit] * bool(unit) + ["logarithmic"] * is_log)
    label = f"{name}: {number(values[0])} at step {first}, {number(values[-1])} last"
    label = escape(f"{label} ({unit})" if unit else label)
    return (
        f"<figure><figcaption>{escape(name)} <small>{about}</small></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _charts(section: str, curves: Mapping[str, list[tuple[int, float]]]) -> str:
    """Draw a group of curves; those that stay constant are named instead."""
    ranges = {name: {value for _, value in points} for name, points in curves.items()}
    drawn = [chart(name, points) for name, points in curves.items() if len(ranges[name]) > 1]
    constant = [
        f"{escape(name)} = {quantity(name, *values)}"
        for name, values in ranges.items()
        if len(values) == 1
    ]
    text = explained.SECTIONS.get(section, "")
    if constant:
        text += f" Constant, or measured once: {', '.join(constant)}."
    charts = f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""
    return f"<h2>{section}</h2>{charts}<p>{text}</p>"


def _sections(curves: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    left = sorted(curves, key=lambda name: (name != "loss/total", name))
    sections = []
    for title, prefix in _SECTIONS:
        names = [name for name in left if name.startswith(prefix)]
        left = [name for name in left if name not in names]
        if names:
            sections.append((title, names))
    return sections


def _cards(curves: Mapping[str, list[tuple[int, float]]]) -> str:
    names = [name for name in curves if name.startswith("eval/")][:8]
    names = names or [name for name in curves if name == "loss/total"]
    cards = "".join(
        f'<div class="card"><b>{quantity(name, curves[name][-1][1])}</b>'
        f"<span>{escape(name.removeprefix('eval/'))}</span></div>"
        for name in names
    )
    return f'<div class="cards">{cards}</div>' if cards else ""


def _prompts(config: Mapping[str, Any]) -> str:
    evaluation = config.get("eval")
    prompts = evaluation.get("prompts", ()) if isinstance(evaluation, Mapping) else ()
    listed = ", ".join(f"“{escape(str(prompt))}”" for prompt in prompts)
    return f"<p>Prompts, from left to right: {listed}.</p>" if listed else ""


def _grids(folder: epath.Path, prompts: str) -> str:
    grids: dict[str, list[tuple[int, epath.Path]]] = {}
    for name, step, path in grid_files(folder):
        grids.setdefault(name, []).append((step, path))
    parts = []
    for name, entries in grids.items():
        *earlier, latest = sorted(entries)
        text = f"<p>{explained.GRIDS.get(name, '')}</p>" + prompts * (name == "samples")
        parts.append(_grid(name, *latest, text))
        # The course of training in a few pictures; all of them would make a heavy page.
        if earlier:
            chosen = sorted({round(i * (len(earlier) - 1) / 2) for i in range(3)})
            inner = "".join(_grid(name, *earlier[i]) for i in chosen)
            parts.append(f"<details><summary>{escape(name)}, earlier</summary>{inner}</details>")
    return f"<h2>Pictures</h2>{''.join(parts)}" if parts else ""


def _grid(name: str, step: int, path: epath.Path, text: str = "") -> str:
    data, name = base64.b64encode(path.read_bytes()).decode(), escape(name)
    caption = f"<figcaption>{name} <small>step {step}</small></figcaption>"
    image = f'<img alt="{name} at step {step}" src="data:image/png;base64,{data}">'
    return f'<figure class="grid">{caption}{image}{text}</figure>'


def _figures(name: str, points: Sequence[tuple[int, float]]) -> str:
    (_, first), (step, last) = points[0], points[-1]
    texts = (quantity(name, first), quantity(name, last), step)
    cells = (f'<td class="number">{text}</td>' for text in texts)
    return f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>"


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round numbers that enclose low and high: (0.13, 0.92) -> [0.0, 0.25, ..., 1.0]."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-30):
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    unit = next(u * power for u in (1, 2, 2.5, 5, 10) if u * power >= raw * (1 - 1e-9))
    begin, end = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    return [i * unit for i in range(begin, end + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    begin, end = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((end - begin) / 5))
    return [10.0**i for i in range(begin, end + stride, stride)]
