"""An understanding model for the package lmms-eval, which runs the paper's benchmarks.

    pip install -e '.[lmms]'
    python -m lmms_eval --model tokenflow_jax --tasks pope,mme --batch_size 16 \
        --model_args pretrained=runs/understanding

`pretrained` is the path of a model that answers; other arguments (tokenizer, template, dtype, ...)
go into --model_args as well. lmms-eval finds this module by the entry point in setup.py; only
lmms-eval needs torch.
"""

from collections.abc import Iterator
from typing import Any

from lmms_eval.api.model import lmms

from tokenflow_jax.unified.api import load_assistant


class TokenFlow(lmms):
    """Answers lmms-eval's requests."""

    is_simple = True

    def __init__(self, pretrained: str = "", batch_size: int | str = 1, **options: Any):
        super().__init__()
        for name in ("device", "max_batch_size"):  # lmms-eval adds them for torch
            options.pop(name, None)
        self.assistant = load_assistant(pretrained, **options)
        self.batch_size = int(batch_size)

    def _pictures(self, get: Any, number: int, task: str, split: str) -> list[Any] | None:
        found = get(self.task_dict[task][split][number])
        return [picture for picture in found or [] if picture is not None] or None

    def _batches(self, requests: list[Any]) -> Iterator[list[tuple]]:
        for start in range(0, len(requests), self.batch_size):
            yield [request.args for request in requests[start : start + self.batch_size]]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answer requests: (question, options, its pictures' getter, number, task, split)."""
        answers: list[str] = []
        for batch in self._batches(requests):
            # The model takes one set of options per call.
            same = all(row[1] == batch[0][1] for row in batch)
            for rows in [batch] if same else [[row] for row in batch]:
                options = rows[0][1]
                sampled = options.get("do_sample", True)
                found = self.assistant.answer(
                    [row[0] for row in rows],
                    [self._pictures(*row[2:6]) for row in rows],
                    max_new=int(options.get("max_new_tokens", 128)),
                    temperature=float(options.get("temperature") or 0.0) if sampled else 0.0,
                    top_p=float(options.get("top_p") or 0.0),
                )
                stops = options.get("until") or []
                stops = [stops] if isinstance(stops, str) else stops
                answers += [_until(text, stops) for text in found]
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Return log probabilities of given answers, and True where the model would say them."""
        found: list[tuple[float, bool]] = []
        for batch in self._batches(requests):
            texts = []
            for row in batch:
                document = self.task_dict[row[4]][row[5]][row[3]]
                texts.append(row[1] if isinstance(row[1], str) else row[1](document))
            pictures = [self._pictures(*row[2:6]) for row in batch]
            found += self.assistant.likelihood([row[0] for row in batch], pictures, texts)
        return found

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Refuse tasks of several rounds, which the paper's benchmarks do not have."""
        raise NotImplementedError("tokenflow_jax answers single-round tasks only")


def _until(text: str, stops: list[str]) -> str:
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text
