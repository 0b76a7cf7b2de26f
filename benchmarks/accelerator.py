"""Check and time this machine's accelerators: goldens, kernels, steps, sampling, answering, cache.

    python -m benchmarks.accelerator                      at most about 8 minutes, 40 GB per device
    python -m benchmarks.accelerator --only=kernels --only=steps
    python -m benchmarks.accelerator --tiny               small sizes, as on CPU

Prints a table and writes accelerator.json and accelerator.md. Weights are random, models of the
published width have a few layers. A part that fails is reported, the others go on; one that would
begin too late is left out. Goldens need a checkout of the repository, whose tests have the vectors.
"""

import argparse
import datetime
import gc
import json
import math
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

_SMALL_MEMORY = 24e9  # bytes; devices with less get smaller models and batches
# Name and the seconds that must be left when it begins; the most important ones first.
PARTS = {
    "goldens": 20, "kernels": 30, "steps": 60, "sampling": 40, "answering": 40, "tokenizer": 30,
    "cache": 40,
}  # fmt: skip


class Row(NamedTuple):
    """One line of the report."""

    name: str
    figures: dict[str, float | bool]


class Setting(NamedTuple):
    """What all parts read."""

    tiny: bool
    platform: str  # "tpu", "gpu" or "cpu"
    small_memory: bool
    say: Callable[[str], None]  # progress


def seconds(run: Callable[[], Any], rounds: int = 5) -> float:
    """Return the median seconds of a call whose result is a tree of arrays, after two first ones.

    Short calls are repeated within a round, so that starting them does not count.
    """
    import jax

    jax.block_until_ready(run())
    began = time.perf_counter()
    jax.block_until_ready(run())
    once = time.perf_counter() - began
    calls = max(1, min(50, int(0.1 / once)))
    times = []
    for _ in range(rounds if once < 1 else 2):
        began = time.perf_counter()
        for _ in range(calls):
            out = run()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - began) / calls)
    return statistics.median(times)


def environment() -> dict[str, Any]:
    """Describe the machine and the software."""
    import jax
    import jaxlib

    device = jax.devices()[0]
    driver = "?"
    if device.platform == "gpu":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            driver = "unknown"
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "memory_gib": round(limit / 2**30, 1),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "runtime": device.client.platform_version.strip().replace("\n", "; "),
        **({"driver": driver.strip().split("\n")[0]} if device.platform == "gpu" else {}),
        "python": sys.version.split()[0],
    }


def run_part(
    rows: Generator[Row], deadline: float, report: Callable[[Row], None]
) -> dict[str, Any]:
    """Run a part until the time is over; return its rows, seconds and any error."""
    began, found = time.monotonic(), {"rows": []}
    try:
        for row in rows:
            wrong = [k for k, v in row.figures.items() if not math.isfinite(v)]
            found["rows"].append({"name": row.name, **row.figures})
            report(row)
            if wrong:
                found["error"] = f"{row.name}: not finite: {', '.join(wrong)}"
            if time.monotonic() > deadline:
                found["stopped"] = "the time is over: rows may be missing"
                break
    except Exception as error:  # whatever a compiler or a device says; the other parts go on
        found["error"] = f"{type(error).__name__}: {str(error)[:500]}"
    finally:
        rows.close()  # leaves its contexts, such as a mesh in use
    found["seconds"] = round(time.monotonic() - began, 1)
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the parts and return the report."""
    import jax

    from benchmarks import accelerator_checks, accelerator_models

    began, about = time.monotonic(), environment()
    deadline = began + 60 * options.minutes

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {text}", file=sys.stderr, flush=True)

    stats = jax.devices()[0].memory_stats() or {}
    small = stats.get("bytes_limit", math.inf) < _SMALL_MEMORY
    tiny = options.tiny or about["platform"] == "cpu"
    setting = Setting(tiny, about["platform"], small, say)
    say(f"{about['devices']} x {about['device']}{', tiny sizes' * tiny}")
    parts = {}
    for name in options.only or PARTS:
        left = deadline - time.monotonic()
        if not tiny and left < PARTS[name]:
            parts[name] = {"rows": [], "skipped": f"{max(left, 0):.0f} s were left", "seconds": 0}
        else:
            say(name)
            module = accelerator_checks if hasattr(accelerator_checks, name) else accelerator_models
            rows = getattr(module, name)(setting)
            parts[name] = run_part(rows, deadline, lambda row: say("  " + line(row._asdict())))
        for what in ("error", "stopped", "skipped"):
            if what in parts[name]:
                say(f"{name}: {what}: {parts[name][what]}")
        gc.collect()
        jax.clear_caches()
    took = round(time.monotonic() - began, 1)
    return {"environment": about, "tiny": tiny, "seconds": took, "parts": parts}


def line(row: dict[str, Any]) -> str:
    """Return a row's figures as text."""
    figures = row.get("figures") or {k: v for k, v in row.items() if k != "name"}

    def text(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "NO"
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"

    return f"{row['name']}: " + ", ".join(f"{k} {text(v)}" for k, v in figures.items())


def markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    about = report["environment"]
    lines = [f"# {about['devices']} x {about['device']}, {about['date']}", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    lines += ["", f"Took {report['seconds']} s{', with tiny sizes' * report['tiny']}.", ""]
    lines += ["| part | what | figures |", "|---|---|---|"]
    for name, part in report["parts"].items():
        for row in part["rows"]:
            what, figures = line(row).split(": ", 1)
            lines.append(f"| {name} | {what} | {figures} |")
        for what in ("error", "stopped", "skipped"):
            if what in part:
                cell = part[what].replace("|", "\\|").replace("\n", " ")
                lines.append(f"| {name} | {what.upper()} | {cell} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run, print and write the report; return 1 if a part failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs/accelerator", help="folder of the report")
    parser.add_argument("--minutes", type=float, default=8, help="time for everything")
    parser.add_argument("--only", action="append", choices=tuple(PARTS), help="some parts")
    parser.add_argument("--tiny", action="store_true", help="small sizes; always so on CPU")
    options = parser.parse_args(argv)
    report = run(options)
    folder, page = pathlib.Path(options.out), markdown(report)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "accelerator.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "accelerator.md").write_text(page, encoding="utf-8")
    print(page)
    return int(any("error" in part for part in report["parts"].values()))


if __name__ == "__main__":
    # One module, not two: the parts import this one by its name.
    from benchmarks import accelerator

    sys.exit(accelerator.main())
