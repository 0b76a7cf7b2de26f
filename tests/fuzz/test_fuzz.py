"""Every reader of files answers mutated ones with a right load or an error that names the file."""

import os
import pathlib

import pytest

from tests.fuzz import run as fuzz
from tests.fuzz.readers import Reader, all_readers
from tests.fuzz.work import Job, _judge, make_input


def check(seed, inputs):
    report = fuzz.run([Job(name, seed, 0, inputs) for name in all_readers()])
    assert not report.failures, "\n".join(report.failures[:5])
    for name, counts in report.counts.items():
        assert counts["clean"] > 0 and sum(counts.values()) == inputs, name


def test_a_few_mutated_files():
    check(seed=1, inputs=20)


@pytest.mark.slow
def test_a_thousand_mutated_files_for_each_reader():
    check(seed=2, inputs=1000)


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
