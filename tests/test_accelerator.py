"""The benchmark of accelerators: its report, and all of its parts with tiny sizes on CPU."""

import json
import math
import os
import subprocess
import sys
import time

import pytest

from benchmarks import accelerator
from benchmarks.accelerator import Row


def rows(*figures, error=None):
    for i, value in enumerate(figures):
        yield Row(f"row {i}", {"ms": value})
    if error:
        raise error


def test_a_part_that_fails_keeps_its_rows_and_says_why():
    seen = []
    error = RuntimeError("out of memory")
    part = accelerator.run_part(rows(1.0, 2.0, error=error), time.monotonic() + 60, seen.append)
    assert [row["ms"] for row in part["rows"]] == [1.0, 2.0] and len(seen) == 2
    assert part["error"] == "RuntimeError: out of memory"
    part = accelerator.run_part(rows(1.0, math.nan, 3.0), time.monotonic() + 60, seen.append)
    assert part["error"] == "row 1: not finite: ms" and len(part["rows"]) == 3


def test_a_part_stops_when_the_time_is_over():
    given = rows(1.0, 2.0)
    part = accelerator.run_part(given, time.monotonic() - 1, lambda row: None)
    assert next(given, "closed") == "closed"
    assert len(part["rows"]) == 1 and "time is over" in part["stopped"] and "error" not in part


def test_the_page_has_a_line_for_everything():
    parts = {
        "steps": {"rows": [{"name": "7B", "MFU %": 41.26, "within tolerance": False}]},
        "kernels": {"rows": [], "error": "a | b\nc"},
        "cache": {"rows": [], "skipped": "3 s were left"},
    }
    about = {"devices": 2, "device": "H100", "date": "today", "jax": "0.10.2"}
    page = accelerator.markdown(
        {"environment": about, "tiny": False, "seconds": 5.0, "parts": parts}
    )
    assert "# 2 x H100, today" in page and "- jax: 0.10.2" in page
    assert "| steps | 7B | MFU % 41.26, within tolerance NO |" in page
    assert "| kernels | ERROR | a \\| b c |" in page
    assert "| cache | SKIPPED | 3 s were left |" in page


@pytest.mark.slow
def test_every_part_on_cpu(tmp_path):
    """Optimized programs: the goldens of the tokenizer have their published size."""
    command = [sys.executable, "-m", "benchmarks.accelerator", f"--out={tmp_path}", "--minutes=9"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "accelerator.json").read_text())
    assert done.stdout.strip() == (tmp_path / "accelerator.md").read_text().strip()
    assert report["environment"]["platform"] == "cpu" and report["tiny"]
    least = {"goldens": 13, "kernels": 4, "steps": 3, "sampling": 1, "answering": 1}
    least |= {"tokenizer": 4, "cache": 1}
    assert {name: len(part["rows"]) for name, part in report["parts"].items()} == least
    for part in report["parts"].values():
        assert not part.keys() & {"error", "skipped", "stopped"}
        for row in part["rows"]:
            for name, value in row.items():
                if name == "name":
                    continue
                exact = "error" in name or "off by" in name  # may be 0
                assert math.isfinite(value) and (value >= 0 if exact else value > 0), row
    goldens = report["parts"]["goldens"]["rows"]
    assert all(row["within tolerance"] is True for row in goldens)
    assert {row["name"].split(",")[1] for row in goldens} == {" float32", " bfloat16"}
    (codes,) = (row["codes equal %"] for row in goldens if "codes equal %" in row)
    assert codes > 99.9
    (cache,) = report["parts"]["cache"]["rows"]
    assert cache["second s"] < cache["first s"] and "compiling the step" in done.stderr
