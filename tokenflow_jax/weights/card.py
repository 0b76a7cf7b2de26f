"""Model cards: README.md of a saved model, made of what is known of it."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from tokenflow_jax import files
from tokenflow_jax.messages import one_line
from tokenflow_jax.train import curves


class Trained(NamedTuple):
    """Where loaded weights come from, as far as that is known."""

    path: str = ""  # that was loaded, absolute
    step: int | None = None
    weights: str = ""  # "ema" or "raw"
    saved: Mapping[str, Any] = {}  # the config of the run, or the record of a file

    @classmethod
    def of(cls, path: str | os.PathLike, source: Any) -> "Trained":
        """Describe an opened `conversion.Source`."""
        return cls(os.fspath(files.absolute(path)), source.step, source.weights, source.saved)

    def workdir(self) -> epath.Path | None:
        """Return the run's folder if the weights were loaded from there."""
        if self.step is None or "total_steps" not in self.saved:
            return None
        path = epath.Path(self.path)
        above = (path, *list(path.parents)[:2])
        return next((folder for folder in above if (folder / "checkpoints").is_dir()), None)

    def facts(self) -> dict[str, Any]:
        """Return what a card says of the training, JSON-able; what is unknown is left out."""
        run = self.saved
        if "total_steps" not in run:  # a file: what its own card was made of
            known = run.get("training")
            return known if isinstance(known, dict) else {}
        data, optimizer = run.get("data", {}), run.get("optimizer")
        optimizer = optimizer if isinstance(optimizer, Mapping) else {}
        facts = {
            "config": os.path.basename(str(run.get("config_file") or "")),
            "started_from": os.path.basename(str(run.get("init_from") or "")),
            "data": data.get("name"),
            "split": data.get("split"),
            "steps": f"{self.step} of {run['total_steps']}",
            "batch_size": run.get("batch_size"),
            "seed": run.get("seed"),
            "optimizer": optimizer.get("name"),
            "learning_rate": optimizer.get("learning_rate"),
            "weights": {"ema": "moving average", "raw": "last step"}.get(self.weights),
        }
        workdir = self.workdir()
        lines = curves.read_history(workdir / "metrics.jsonl") if workdir else []
        lines = [n for n in lines if n["step"] <= self.step and any(k[:5] == "eval/" for k in n)]
        if lines and (self.weights == "ema" or not run.get("ema_decay")):  # what was evaluated
            figures = {k[5:]: v for k, v in lines[-1].items() if k[:5] == "eval/"}
            facts["held_out"] = {"step": lines[-1]["step"], "split": data.get("eval_split")}
            facts["held_out"]["figures"] = {k: v for k, v in figures.items() if v is not None}
        return {name: value for name, value in facts.items() if value not in (None, "")}

    def pictures(self) -> dict[str, epath.Path]:
        """Return the run's newest grids up to this step by name."""
        images = (self.workdir() or epath.Path("/nowhere")) / "images"
        files = curves.grid_files(images) if images.is_dir() else []
        return {name: path for name, step, path in files if step <= self.step}


UNKNOWN = Trained()


_KINDS = {  # stage -> title, sentences, the hub's pipeline tag, lines of Python
    "tokenizer": (
        "TokenFlow image tokenizer",
        "It turns pictures into codes, coarse to fine, and back. One code selects a semantic and a "
        "pixel vector (TokenFlow, arXiv 2412.03069).",
        "image-feature-extraction",
        """tokenizer = tfx.Tokenizer.from_pretrained("{name}")
codes = tokenizer.encode("picture.png")
tokenizer.to_images(codes)[0].save("back.png")""",
    ),
    "generation": (
        "TokenFlow text-to-image model",
        "It draws pictures from prompts by writing the codes of an image tokenizer scale by scale "
        "(TokenFlow, arXiv 2412.03069).",
        "text-to-image",
        """generator = tfx.Generator.from_pretrained("{name}")
generator.generate("red apple", seed=1).pictures[0].save("apple.png")""",
    ),
    "understanding": (
        "TokenFlow image-to-text model",
        "It answers questions about pictures, which it reads through an image tokenizer "
        "(TokenFlow, arXiv 2412.03069).",
        "image-text-to-text",
        """assistant = tfx.Assistant.from_pretrained("{name}")
print(assistant.answer("What is this?", "picture.png"))""",
    ),
    "unified": (
        "TokenFlow model that reads and draws pictures",
        "It answers questions about pictures, draws pictures by writing the codes of an image "
        "tokenizer scale by scale, and talks about what it drew (TokenFlow, arXiv 2412.03069).",
        "any-to-any",
        """chat = tfx.Unified.from_pretrained("{name}").chat()
chat.draw("red apple", seed=1).save("apple.png")
print(chat.ask("What is this?"))""",
    ),
}


def write_card(
    stage: str,
    name: str,
    rows: Mapping[str, Any],
    facts: Mapping[str, Any],
    pictures: Sequence[str],
) -> str:
    """Return the card of a folder as Markdown: a table of the model, `Trained.facts`, pictures."""
    (title, about, task, use), held_out = _KINDS[stage], facts.get("held_out")
    front = ["library_name: tokenflow_jax", f"pipeline_tag: {task}", "tags: [tokenflow, jax]"]
    use = f"import tokenflow_jax as tfx\n\n{use.format(name=name)}"
    parts = ["\n".join(["---", *front, "---"]), f"# {title}", about]
    parts += ["## Use", f"```python\n{use}\n```", "## Model", _table(rows)]
    rows = {n.replace("_", " "): v for n, v in facts.items() if n != "held_out"}
    parts += ["## Training", _table(rows)] if rows else []
    if isinstance(held_out, dict) and isinstance(figures := held_out.get("figures"), dict):
        split, step = (_text(held_out.get(key)) for key in ("split", "step"))
        parts += ["## Held-out figures", f"Split {split}, step {step}.", _table(figures)]
    parts += ["## Pictures", *(f"![{path}]({path})" for path in pictures)] if pictures else []
    return "\n\n".join(parts) + "\n"


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {_text(name)} | {_text(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _text(value: Any) -> str:
    """Format a value for a cell; it may come from a file that anybody wrote."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = f"{value:,}" if type(value) is int else one_line(str(value), 200)
    return text.translate(str.maketrans({mark: f"\\{mark}" for mark in "|<`[]*\\"}))
