"""Runs jobs in worker processes; a worker that hangs or dies is a failure of its input."""

import collections
import dataclasses
import json
import os
import pathlib
import select
import subprocess
import sys
import tempfile

from tests.fuzz.work import MOST_SECONDS, Job, ascii_lines, keep

_START_SECONDS = 180.0  # to import all and to make the seeds
_ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass
class Report:
    """Outcomes by reader, seconds by reader, and a text for every failure."""

    counts: dict[str, collections.Counter]
    seconds: collections.Counter
    failures: list[str]


def run(jobs: list[Job]) -> Report:
    """Try all inputs of all jobs."""
    report = Report({job.reader: collections.Counter() for job in jobs}, collections.Counter(), [])
    left = list(jobs)
    while left:
        left = _run_worker(left, report)
    return report


def _run_worker(jobs: list[Job], report: Report) -> list[Job]:
    """Run jobs until they end or a worker does; return the jobs that are left."""
    text = json.dumps([dataclasses.asdict(job) for job in jobs])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_ROOT)}
    number, index = 0, jobs[0].first
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryDirectory() as home:
        worker = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz", "--worker", text, "--home", home],
            bufsize=0, stdout=subprocess.PIPE, stderr=errors, cwd=_ROOT, env=environment,
        )  # fmt: skip
        seconds, started = _START_SECONDS, False
        while number < len(jobs):
            ready, _, _ = select.select([worker.stdout], [], [], seconds)
            line = worker.stdout.readline() if ready else b""
            if not line:
                break
            result, job = json.loads(line), jobs[number]
            if result == {"ready": number}:
                seconds, started = MOST_SECONDS + 5, True
                continue
            assert (result["job"], result["index"]) == (number, index)
            report.counts[job.reader][result["outcome"]] += 1
            report.seconds[job.reader] += result["seconds"]
            if result["why"]:
                _fail(report, job, index, result["why"])
            index += 1
            if index == job.first + job.inputs:
                number, seconds, started = number + 1, _START_SECONDS, False
                index = jobs[number].first if number < len(jobs) else 0
        worker.kill()
        code = worker.wait()
        if number == len(jobs):
            return []
        job = jobs[number]
        keep(job, index, pathlib.Path(home, "case"))
        errors.seek(0)
        tail = errors.read()[-1500:].decode(errors="replace")
        if not started:
            raise RuntimeError(f"the files for {job.reader} cannot be made or read:\n{tail}")
    report.counts[job.reader]["wrong"] += 1
    reason = f"ends the process ({code})" if ready else f"takes more than {MOST_SECONDS:g} s"
    _fail(report, job, index, f"{reason}\n{ascii_lines(tail)}")
    rest = dataclasses.replace(job, first=index + 1, inputs=job.first + job.inputs - index - 1)
    return [*([rest] if rest.inputs else []), *jobs[number + 1 :]]


def _fail(report: Report, job: Job, index: int, why: str) -> None:
    again = f"python -m tests.fuzz --reader={job.reader} --input={job.kept(index)}"
    report.failures.append(f"{job.reader} {index}: {why}\n  {again}\n")
