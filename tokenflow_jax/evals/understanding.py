"""Scores a trained understanding model on a file of questions.

    python -m tokenflow_jax.evals.understanding --task=pope --file=pope.jsonl \
        --image_folder=val2014 --checkpoint=runs/understanding --out=pope_answers.jsonl
    python -m tokenflow_jax.evals.understanding --task=pope --file=pope.jsonl \
        --predictions=pope_answers.jsonl

The file has one JSON object per line, as the benchmarks publish them: `question` or `text`; `image`
(a path, may be missing); `answers`, `answer` or `label`; for MME `category`; for multiple choice
`options`, `choices`, or keys A, B, ... Tasks: vqa, exact, pope, mme, choice. Answers are saved one
per line ({"question_id", "answer"}) as they come: the same command goes on where it was killed, and
--predictions scores answers of any model.
"""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from tokenflow_jax import log as runlog
from tokenflow_jax.evals import command
from tokenflow_jax.evals.understanding_scores import TASKS, Question, Task


def read_questions(path: str | os.PathLike, limit: int = 0) -> list[Question]:
    """Reads a file of questions; one without `question_id` gets its line number.

    Args:
      path: .jsonl in UTF-8.
      limit: only so many, evenly spaced; 0 all.

    Raises:
      ValueError: lines that are no JSON objects (all of them), or none at all.
    """
    rows, bad = [], []
    lines = pathlib.Path(path).read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append({"question_id": number} | row)
        else:
            bad.append(number)
    if bad or not rows:
        raise ValueError(
            f"{path}: lines {bad[:10]} are no JSON objects" if bad else f"{path} has no questions"
        )
    count = min(limit or len(rows), len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def read_answers(path: str | os.PathLike) -> dict[Any, str]:
    """Answers by question id: `answer`, or `text` or `prediction` as others call it."""
    answers = {}
    for line in pathlib.Path(path).read_bytes().splitlines():
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except ValueError:
            continue  # the last line of a killed run
        found = next((row[k] for k in ("answer", "text", "prediction") if k in row), None)
        if "question_id" in row and isinstance(found, str):
            answers[row["question_id"]] = found
    return answers


def score(task: str, questions: Sequence[Question], answers: Mapping[Any, str]) -> dict[str, float]:
    """The figures of a task.

    Args:
      task: a key of TASKS.
      questions: of `read_questions`.
      answers: by question id.

    Raises:
      ValueError: questions without an answer.
    """
    missing = [q["question_id"] for q in questions if q["question_id"] not in answers]
    if missing:
        raise ValueError(f"{len(missing)} questions have no answer, for example {missing[:5]}")
    figures = TASKS[task].score(questions, [answers[q["question_id"]] for q in questions])
    return {**figures, "questions": float(len(questions))}


def ask(
    assistant: Any,
    task: Task,
    questions: Sequence[Question],
    folder: pathlib.Path,
    *,
    instruction: str | None = None,
    batch_size: int = 16,
    max_new: int = 32,
) -> Iterator[tuple[Any, str]]:
    """Asks a model, greedily.

    Args:
      assistant: an `assistant.Assistant`.
      task: how to ask.
      questions: what; those with and without picture are asked apart.
      folder: where images' paths begin.
      instruction: see `Task.prompt`.
      batch_size, max_new: questions at a time, and tokens of an answer at most.

    Yields:
      (question id, answer).
    """
    for wanted in (True, False):
        part = [q for q in questions if bool(q.get("image")) == wanted]
        for start in range(0, len(part), batch_size):
            rows = part[start : start + batch_size]
            texts = [task.prompt(q, instruction) for q in rows]
            shown = [folder / q["image"] if wanted else None for q in rows]
            found = assistant.answer(texts, shown, max_new=max_new)
            yield from zip((q["question_id"] for q in rows), found, strict=True)


def main(options: flags.FlagValues = flags.FLAGS) -> None:
    """Asks and scores what the flags say.

    Raises:
      ValueError: wrong flags, files or weights.
      OSError: a file cannot be read or written.
    """
    missing = [name for name in ("task", "file") if not options[name].value]
    if missing or not (options.checkpoint or options.predictions):
        missing += (
            [] if options.checkpoint or options.predictions else ["checkpoint (or predictions)"]
        )
        raise ValueError(f"say {' and '.join('--' + name for name in missing)}")
    questions = read_questions(options.file, options.limit)
    out = pathlib.Path(options.predictions or options.out or f"{options.file}.answers.jsonl")
    if not options.predictions:
        folder = pathlib.Path(options.image_folder or pathlib.Path(options.file).parent)
        answers_to(
            out,
            questions,
            _load(options),
            TASKS[options.task],
            folder,
            instruction=options.instruction,
            batch_size=options.batch_size,
            max_new=options.max_new,
        )
    figures = score(options.task, questions, read_answers(out))
    for name, value in figures.items():
        runlog.log.info("%s: %s", name, f"{value:.4g}")
    result = {"task": options.task, "file": options.file, "figures": figures}
    path = out.with_name(out.name + ".score.json")
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    runlog.log.info("answers in %s, figures in %s", out, path)


def answers_to(
    out: pathlib.Path,
    questions: Sequence[Question],
    assistant: Any,
    task: Task,
    folder: pathlib.Path,
    **options: Any,
) -> None:
    """Asks what a file of answers does not have yet, and adds every answer to it.

    Args:
      out: the file.
      questions, assistant, task, folder: see `ask`.
      **options: of `ask`.
    """
    known = read_answers(out) if out.exists() else {}
    left = [q for q in questions if q["question_id"] not in known]
    with out.open("a", encoding="utf-8") as file:
        if known:
            file.write("\n")  # a killed run may have left half a line
        for identity, answer in ask(assistant, task, left, folder, **options):
            row = {"question_id": identity, "answer": answer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()


def _load(options: flags.FlagValues) -> Any:
    """The model that the flags name."""
    from tokenflow_jax.understanding.api import Assistant  # not needed for scoring

    return Assistant.load(
        options.checkpoint,
        options.variant,
        tokenizer=options.tokenizer,
        tokenizer_variant=options.tokenizer_variant,
        text_tokenizer=options.text_tokenizer,
        template=options.template,
        system=options.system,
        image_mode=options.image_mode,
        step=options.step,
    )


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Not at import: other commands have flags of the same names."""
    flags.DEFINE_enum("task", None, list(TASKS), "How to ask and to count.", flag_values=values)
    flags.DEFINE_string("file", None, "The questions, .jsonl.", flag_values=values)
    flags.DEFINE_string(
        "image_folder", "", "Where images' paths begin; the file's folder.", flag_values=values
    )
    flags.DEFINE_string(
        "checkpoint", None, "The model; see tokenflow_jax.answer.", flag_values=values
    )
    flags.DEFINE_string("variant", None, "Which model PyTorch weights are.", flag_values=values)
    flags.DEFINE_integer(
        "step", None, "Which checkpoint of a workdir; the newest.", flag_values=values
    )
    flags.DEFINE_string(
        "tokenizer", None, "The image tokenizer; a training run knows.", flag_values=values
    )
    flags.DEFINE_string("tokenizer_variant", None, "Of a PyTorch tokenizer.", flag_values=values)
    flags.DEFINE_string("text_tokenizer", None, "A folder or bytes.", flag_values=values)
    flags.DEFINE_string(
        "template", None, "Of conversations; a training run knows.", flag_values=values
    )
    flags.DEFINE_string(
        "system",
        None,
        "What conversations begin with, if not as the template says.",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "image_mode",
        None,
        ["pad", "square"],
        "As in training; a training run knows.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "instruction",
        None,
        "The line behind a question instead of the task's; '' leaves it out.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "out", None, "File for the answers; FILE.answers.jsonl by default.", flag_values=values
    )
    flags.DEFINE_string(
        "predictions", None, "Score these answers; no model is asked.", flag_values=values
    )
    flags.DEFINE_integer(
        "limit", 0, "Only so many questions, evenly spaced; 0 all.", flag_values=values
    )
    flags.DEFINE_integer(
        "batch_size", 16, "Questions at a time.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_integer(
        "max_new", 32, "Tokens of an answer at most.", lower_bound=1, flag_values=values
    )


if __name__ == "__main__":
    define_flags()
    command.run("understanding", main)
