r"""Score a trained understanding model, or the answers of any model, on a file of questions.

    python -m tokenflow_jax.evals.understanding --task=pope --file=pope.jsonl \
        --image_folder=val2014 --checkpoint=runs/understanding --out=pope_answers.jsonl
    python -m tokenflow_jax.evals.understanding --task=pope --file=pope.jsonl \
        --predictions=pope_answers.jsonl

The file has one JSON object per line, as the benchmarks publish them: `question` or `text`; `image`
(a path, optional); `answers`, `answer` or `label`; for MME `category`; for multiple choice
`options`, `choices`, or keys A, B, ... Answers are saved one per line ({"question_id", "answer"})
as they come, so that the same command continues a killed one. Where questions share an id, as in
MME's file, answers belong to them in order; ours also note the "occurrence".
"""

import collections
import functools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from tokenflow_jax import answer, cli, files, remote
from tokenflow_jax.data import images, jsonl, mixture
from tokenflow_jax.data.examples import Broken, evenly_spaced
from tokenflow_jax.evals.understanding_scores import TASKS, Question, Task
from tokenflow_jax.log import Progress, compiling, log
from tokenflow_jax.messages import bullets, plain, shown

_OCCURRENCE = "occurrence"  # number of earlier questions with the same id
_REFERENCES = ("answers", "answer", "label")
_MOST_BYTES = 2**26  # of a training file, to look for an instruction


def read_questions(path: str | os.PathLike, limit: int = 0) -> list[Question]:
    """Read questions, at most `limit` evenly spaced ones; the line number is the default id."""
    parsed = dict(_rows(path))
    if bad := [number for number, row in parsed.items() if row is None]:
        raise ValueError(
            f"{path}: lines {bad[:10]} are no JSON objects with an id of text or digits; "
            "give one object per line, .jsonl"
        )
    if not parsed:
        raise ValueError(f"{path} has no questions")
    rows = [{"question_id": number} | row for number, row in parsed.items()]
    seen: collections.Counter = collections.Counter()
    for row in rows:
        row.pop(_OCCURRENCE, None)  # the file's own means something else
        if earlier := seen[row["question_id"]]:
            row[_OCCURRENCE] = earlier
        seen[row["question_id"]] += 1
    return [rows[i] for i in evenly_spaced(len(rows), limit)]


def _rows(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield number and object of the lines of a file, None for one that cannot be used."""
    if remote.kind_of(path) != "file":
        raise ValueError(f"{os.fspath(path)!r} is not a file")
    with open(remote.local_copy(path), "rb") as file:
        for number, _, line in jsonl.lines_of(file):
            try:
                row = jsonl.parse_object(line)
            except Broken:
                row = None
            else:  # an id is a key
                row = row if isinstance(row.get("question_id", ""), str | int | float) else None
            yield number, row


def key_of(question: Question) -> Any:
    """Return the id of a question, or (id, occurrence) where others before it have the same id."""
    identity, occurrence = question["question_id"], question.get(_OCCURRENCE, 0)
    return (identity, occurrence) if occurrence else identity


def read_answers(path: str | os.PathLike) -> dict[Any, str]:
    """Read answers by `key_of`: `answer`, or `text` or `prediction` as others call it."""
    answers: dict[Any, str] = {}
    seen: collections.Counter = collections.Counter()
    for number, row in _rows(path):
        row = row or {}  # a killed run may leave half a line
        found = next((row[k] for k in ("answer", "text", "prediction") if k in row), None)
        if "question_id" in row and isinstance(found, str):
            identity = row["question_id"]
            noted = type(row.get(_OCCURRENCE)) is int and row[_OCCURRENCE] >= 0
            if not noted:
                row[_OCCURRENCE] = seen[identity]
                seen[identity] += 1
            if answers.setdefault(key_of(row), found) != found:
                raise ValueError(
                    f"{path}, line {number}: another answer to question {shown(identity)}, "
                    f"occurrence {shown(row[_OCCURRENCE])}: keep one of them"
                )
    return answers


def score(
    task: str,
    questions: Sequence[Question],
    answers: Mapping[Any, str],
    everything: Sequence[Question] = (),
) -> dict[str, float]:
    """Return the figures of a task, a key of TASKS, for answers by `key_of`.

    Answers to other questions of `everything`, the whole file, are no surplus.
    """
    keys = [key_of(q) for q in questions]
    missing = [key for key in keys if key not in answers]
    if missing:
        raise ValueError(f"{len(missing)} questions have no answer, such as {shown(missing[:5])}")
    ids = {q["question_id"] for q in questions}
    known = {*keys, *map(key_of, everything)}
    double = [k[0] for k in answers if isinstance(k, tuple) and k[0] in ids and k not in known]
    if double:
        raise ValueError(
            f"more answers than questions have the ids {shown(double[:5])}: keep one of each"
        )
    figures = TASKS[task].score(questions, [answers[key] for key in keys])
    return {**figures, "questions": float(len(questions))}


def picture_paths(
    questions: Sequence[Question], folder: str | os.PathLike, allow_outside: bool = False
) -> list[str | None]:
    """Return the paths of the questions' pictures; ValueError lists those outside the folder."""
    paths: list[str | None] = []
    problems = []
    for question in questions:
        try:
            name = question.get("image")
            paths.append(images.locate(name, folder, allow_outside) if name else None)
        except Broken as error:
            problems.append(f"question {shown(question['question_id'])}: {error}")
    if problems:
        raise ValueError(f"pictures that cannot be shown:\n{bullets(problems)}")
    return paths


def check(task: Task, questions: Sequence[Question], paths: Sequence[str | None]) -> bool:
    """Tell whether the questions have answers to score; ValueError lists what a task lacks."""
    scored = any(name in question for question in questions for name in _REFERENCES)
    problems = []
    for question, path in zip(questions, paths, strict=True):
        try:
            task.prompt(question)
            if scored:
                task.score([question], [""])
            if path and not remote.is_remote(path) and not os.path.isfile(path):
                raise ValueError(f"there is no picture {shown(path)}")
        except ValueError as error:
            problems.append(f"question {shown(question['question_id'])}: {error}")
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(questions)} questions do not fit the task:\n"
            f"{bullets(problems)}"
        )
    return scored


def is_unknown(instruction: str, saved: Mapping[str, Any]) -> bool:
    """Tell that a run's conversations have no such line, as far as they can still be read."""
    if "total_steps" not in saved or not isinstance(saved.get("data"), dict):
        return False  # no run of ours: models of others are trained with these lines
    for _, data in mixture.settings(ConfigDict(saved["data"])).values():
        if data.name == "emoji":
            continue
        if data.name != "jsonl" or not os.path.isfile(data.path):
            return False
        with open(data.path, "rb") as file:
            if instruction.encode() in file.read(_MOST_BYTES):
                return False
    return True


def ask(
    assistant: Any,
    task: Task,
    questions: Sequence[Question],
    folder: str | os.PathLike,
    *,
    instruction: str | None = None,
    batch_size: int = 16,
    max_new: int = 32,
    allow_outside: bool = False,
) -> Iterator[tuple[Any, str]]:
    """Ask an `Assistant` the questions, greedily, and yield (`key_of`, answer)."""
    paths = picture_paths(questions, folder, allow_outside)
    # Questions with and without a picture have different shapes.
    for has_image in (True, False):
        part = [i for i, path in enumerate(paths) if (path is not None) == has_image]
        for start in range(0, len(part), batch_size):
            places = part[start : start + batch_size]
            rows = [questions[i] for i in places]
            texts = [task.prompt(q, instruction) for q in rows]
            found = assistant.answer(texts, [paths[i] for i in places], max_new=max_new)
            yield from zip(map(key_of, rows), found, strict=True)


def answers_to(
    out: str | os.PathLike,
    questions: Sequence[Question],
    assistant: Any,
    task: Task,
    folder: str | os.PathLike,
    **options: Any,
) -> None:
    """Ask what the file `out` has no answer to, and append every answer; see `ask`."""
    known = read_answers(out) if remote.kind_of(out) else {}
    left = [q for q in questions if key_of(q) not in known]
    with files.appended(out) as write:
        if known:
            write("\n")  # a killed run may have left half a line
        asked = ask(assistant, task, left, folder, **options)
        line = Progress("ask", len(left), "questions")
        for key, text in line.over(asked, options.get("batch_size", 16)):
            identity, occurrence = key if isinstance(key, tuple) else (key, 0)
            row = {"question_id": identity, "answer": text}
            row |= {_OCCURRENCE: occurrence} if occurrence else {}
            write(json.dumps(row, ensure_ascii=False) + "\n")


def main(options: flags.FlagValues) -> None:
    asks = not options.predictions
    missing = [f"--{name}" for name in ("task", "file") if not options[name].value]
    if asks and not options.checkpoint:
        missing.append("--checkpoint (or predictions)")
    if missing:
        raise ValueError(f"missing {' and '.join(missing)}")
    everything = read_questions(options.file)
    questions = [everything[i] for i in evenly_spaced(len(everything), options.limit)]
    task = TASKS[options.task]
    out = files.as_path(options.predictions or options.out or f"{options.file}.answers.jsonl")
    if asks:
        folder = options.image_folder or os.path.dirname(options.file) or "."
        # All of this before the model is loaded.
        paths = picture_paths(questions, folder, options.allow_outside)
        files.writable_folder(out.parent)
        scored = check(task, questions, paths)
        log.info("%s", compiling(f"loading {options.checkpoint} and compiling", 20))
        assistant = answer.load_assistant(options)
        if options.instruction is None and is_unknown(task.instruction, assistant.trained.saved):
            log.warning(
                "the training data of %s has no line %r, which --task=%s adds to each question: "
                "--instruction='' leaves it out, --instruction=TEXT replaces it",
                options.checkpoint, task.instruction, options.task,
            )  # fmt: skip
        answers_to(
            out,
            questions,
            assistant,
            task,
            folder,
            allow_outside=options.allow_outside,
            instruction=options.instruction,
            batch_size=options.batch_size,
            max_new=options.max_new,
        )
        if not scored:
            log.warning("%s has no answers to compare with: ours are in %s", options.file, out)
            return
    figures = score(options.task, questions, read_answers(out), everything)
    for name, value in figures.items():
        log.info("%s: %s", plain(name), f"{value:.4g}")
    result = {"task": options.task, "file": options.file, "figures": figures}
    path = out.with_name(out.name + ".score.json")
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    log.info("answers in %s, figures in %s", out, path)


def define_flags(define: cli.Define) -> None:
    define.enum("task", None, list(TASKS), "The benchmark, which decides how to ask and score.")
    define.string("file", None, "The questions, .jsonl.")
    define.string("image_folder", "", "Where images' paths begin; the file's folder by default.")
    define.bool("allow_outside", False, "Read pictures outside the folder, by path or link.")
    answer.define_assistant_flags(define)
    define.string("instruction", None, "Replaces the task's line after a question; '': none.")
    define.string("out", None, "File for the answers; FILE.answers.jsonl by default.")
    define.string("predictions", None, "Score these answers; no model is asked.")
    define.integer("limit", 0, "Number of evenly spaced questions; 0: all.")
    define.integer("batch_size", 16, "Questions at a time.", 1)
    define.integer("max_new", 32, "Tokens of an answer at most.", 1)


run = functools.partial(cli.run, "understanding", main, define_flags)

if __name__ == "__main__":
    sys.exit(run())
