"""Every reader of files answers mutated ones with a right load or an error that names the file."""

import os
import pathlib

import pytest

from tests.fuzz import run as fuzz
from tests.fuzz.readers import NAMES, Reader
from tests.fuzz.work import Job, _judge, make_input


def check(report, name, inputs):
    failures = [text for text in report.failures if text.startswith(f"{name} ")]
    assert not failures, "\n".join(failures[:5])
    assert report.counts[name].total() == inputs


@pytest.fixture(name="quick", scope="module")
def _quick():
    return fuzz.run([Job(name, 1, 0, 20) for name in NAMES])


@pytest.fixture(name="long", scope="module")
def _long():
    return fuzz.run([Job(name, 2, 0, 1000) for name in NAMES])


@pytest.mark.parametrize("name", NAMES)
def test_a_few_mutated_files(quick, name):
    check(quick, name, 20)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_mutated_files(long, name):
    check(long, name, 1000)


def test_inputs_are_reproducible():
    reader = Reader(lambda folder: [], lambda folder: None, {".json": "json"})
    seeds = [{"a.json": b'{"a": [1, 2, {"b": null}]}', "b": bytes(99)}]
    inputs = [make_input("x", reader, seeds, 3, i) for i in range(200)]
    assert inputs == [make_input("x", reader, seeds, 3, i) for i in range(200)]
    assert len({str(files) for files in inputs}) > 100


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (ValueError("a.pt is damaged"), ""),
        (FileNotFoundError(2, "No such file", "folder/a.pt"), ""),
        (ValueError("damaged"), "names no file"),
        (ValueError("a.pt: \x1b[2J"), "control characters"),
        (ValueError("a.pt " * 1000), "5,000 characters"),
        (RecursionError("a.pt"), "another type of error"),
        (MemoryError(), "another type of error"),
    ],
)
def test_errors_are_judged(error, problem):
    found = _judge(error, {"a.pt": b""}, pathlib.Path(os.devnull))
    assert found.startswith(problem) and bool(found) == bool(problem)
