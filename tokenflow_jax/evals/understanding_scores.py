"""Scores of answers about pictures, in the forms in which the benchmarks publish them.

A task reads questions (dicts, one per line of its file) and answers (texts), and gives figures from
0 to 1, except MME's, which are out of 200 per category as published.
"""

import ast
import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenflow_jax.evals.vqa_text import normalize, vqa_accuracy

Question = Mapping[str, Any]

MME_PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
    "artwork", "OCR",
)  # fmt: skip
MME_COGNITION = (
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
)  # fmt: skip
_LETTERS = "ABCDEFGHIJ"


def references_of(question: Question) -> list[str]:
    """The right answers of a question: `answers` (texts, or VQA's dicts), `answer` or `label`."""
    found = question.get("answers", question.get("answer", question.get("label")))
    found = found if isinstance(found, list) else [found]
    texts = [item.get("answer") if isinstance(item, Mapping) else item for item in found]
    if not texts or any(text is None for text in texts):
        raise ValueError(f"no answer to compare with in {dict(question)!r:.200}")
    return [str(text) for text in texts]


def score_vqa(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """VQA accuracy, of `vqa_text.vqa_accuracy`."""
    scores = [
        vqa_accuracy(answer, references_of(question))
        for question, answer in zip(questions, answers, strict=True)
    ]
    return {"vqa_accuracy": _mean(scores)}


def score_exact(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Whether the answer is one of the references, after the normalisation of VQA."""
    scores = [
        normalize(answer) in {normalize(reference) for reference in references_of(question)}
        for question, answer in zip(questions, answers, strict=True)
    ]
    return {"exact_match": _mean(scores)}


def pope_answer(answer: str) -> str:
    """ "yes" or "no": POPE's reading of a text, by its first sentence."""
    words = answer.split(".")[0].replace(",", "").split()
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def score_pope(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Accuracy, and precision, recall and F1 of "yes", and the share of "yes".

    Questions with a `category` (random, popular, adversarial) get figures of their own, too.
    """
    rows = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        truth = references_of(question)[0].strip().lower()
        if truth not in ("yes", "no"):
            raise ValueError(f"POPE's label must be yes or no, not {truth!r}")
        row = truth == "yes", pope_answer(answer) == "yes"
        rows[""].append(row)
        if question.get("category"):
            rows[f"{question['category']}/"].append(row)
    return {f"{part}{name}": v for part, r in rows.items() for name, v in _yes_figures(r).items()}


def _yes_figures(rows: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    right = sum(truth == said for truth, said in rows)
    hits = sum(truth and said for truth, said in rows)
    said, true = sum(s for _, s in rows), sum(t for t, _ in rows)
    precision, recall = hits / said if said else 0.0, hits / true if true else 0.0
    both = precision + recall
    return {
        "accuracy": right / len(rows),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / both if both else 0.0,
        "yes_rate": said / len(rows),
    }


def mme_answer(answer: str) -> str:
    """ "yes", "no" or "other": MME's reading of a text, by its beginning."""
    answer = answer.strip().lower()
    return next((word for word in ("yes", "no") if word in answer[:4]), "other")


def score_mme(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Per category 100 x (accuracy + accuracy+), and their sums over perception and cognition.

    accuracy+ is the share of pictures with all (two) questions right.
    """
    rows: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for question, answer in zip(questions, answers, strict=True):
        if "category" not in question or "image" not in question:
            raise ValueError(f"MME needs category and image: {dict(question)!r:.200}")
        right = mme_answer(answer) == mme_answer(references_of(question)[0])
        rows[question["category"]][question["image"]].append(right)
    figures = {}
    for category, pictures in rows.items():
        accuracy = _mean([right for answers in pictures.values() for right in answers])
        plus = _mean([all(answers) for answers in pictures.values()])
        figures |= {
            f"{category}/accuracy": accuracy,
            f"{category}/accuracy_plus": plus,
            f"{category}/score": 100 * (accuracy + plus),
        }
    for name, categories in (("perception", MME_PERCEPTION), ("cognition", MME_COGNITION)):
        parts = [figures[f"{c}/score"] for c in categories if c in rows]
        if parts:
            figures[name] = sum(parts)
    return figures


def options_of(question: Question) -> dict[str, str]:
    """Letter -> text of the options.

    They are in `options` or `choices`, a list, a dict or the text of a list (MMMU), or under the
    keys A, B, ... (MMBench) or choice_a, choice_b, ... (SEED-Bench).

    Raises:
      ValueError: there are none.
    """
    found = question.get("options", question.get("choices"))
    if isinstance(found, str):
        try:
            found = ast.literal_eval(found)
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"options {found!r:.100} are no list") from error
    if isinstance(found, Mapping):
        return {str(letter): str(text) for letter, text in found.items()}
    if isinstance(found, list):
        return {letter: str(text) for letter, text in zip(_LETTERS, found, strict=False)}
    texts = {}
    for letter in _LETTERS:
        text = question.get(letter, question.get(f"choice_{letter.lower()}"))
        if text not in (None, "", "nan"):
            texts[letter] = str(text)
    if texts:
        return texts
    raise ValueError(f"no options in {dict(question)!r:.200}")


def choice_of(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer means: the text of an option, a letter in front, or a text inside.

    "A dog" is not A: a capital A before a word is taken for the article.
    """
    answer = answer.strip()
    letters, own = "".join(options), normalize(answer)
    equal = [letter for letter, text in options.items() if normalize(text) == own]
    if len(equal) == 1:
        return equal[0]
    found = re.match(rf"(?:answer:?\s*)?\(?([{letters}])([).:,\s]|$)", answer, re.IGNORECASE)
    alone = len(answer.strip("().:,")) == 1
    if found and (alone or (found[1].isupper() and found[1] + found[2] != "A ")):
        return found[1].upper()
    inside = [letter for letter, text in options.items() if own and normalize(text) in own]
    return inside[0] if len(inside) == 1 else None


def score_choice(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Share of right options, and of answers that mean none."""
    right, unclear = [], []
    for question, answer in zip(questions, answers, strict=True):
        options = options_of(question)
        truth = references_of(question)[0].strip()
        if truth.isdigit() and truth not in options:  # ScienceQA counts from 0
            truth = list(options)[int(truth)]
        choice = choice_of(answer, options)
        right.append(choice == choice_of(truth, options))
        unclear.append(choice is None)
    return {"accuracy": _mean(right), "unclear": _mean(unclear)}


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else 0.0


def question_text(question: Question) -> str:
    """`question` or `text` (which may hold LLaVA's marker, which goes)."""
    for key in ("question", "text"):
        if isinstance(question.get(key), str):
            return question[key].replace("<image>", "").strip()
    raise ValueError(f"no question in {dict(question)!r:.200}")


def choice_text(question: Question) -> str:
    """The question, its hint and its options, one per line."""
    lines = [str(question["hint"])] if question.get("hint") not in (None, "", "nan") else []
    lines.append(question_text(question))
    lines += [f"{letter}. {text}" for letter, text in options_of(question).items()]
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Task:
    """How a benchmark asks and counts.

    Attributes:
      score: (questions, answers) -> figures.
      text: of a question.
      instruction: a line behind the question, as LLaVA's evaluations have it.
    """

    score: Callable[[Sequence[Question], Sequence[str]], dict[str, float]]
    text: Callable[[Question], str] = question_text
    instruction: str = "Answer the question using a single word or phrase."

    def prompt(self, question: Question, instruction: str | None = None) -> str:
        """What the model is asked; `instruction` replaces the task's, "" leaves it out."""
        instruction = self.instruction if instruction is None else instruction
        return f"{self.text(question)}\n{instruction}" if instruction else self.text(question)


TASKS = {
    "vqa": Task(score_vqa),
    "exact": Task(score_exact),
    "pope": Task(score_pope),
    "mme": Task(score_mme),
    "choice": Task(
        score_choice,
        choice_text,
        "Answer with the option's letter from the given choices directly.",
    ),
}
