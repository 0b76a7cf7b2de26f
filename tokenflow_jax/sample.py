"""Draws pictures from text with a trained generation model.

    python -m tokenflow_jax.sample --checkpoint=runs/generation --prompt="red apple" --out=DIR
    python -m tokenflow_jax.sample --checkpoint=... --prompts=FILE --images_per_prompt=4 --out=DIR
    python -m tokenflow_jax.sample --checkpoint=... --layout=geneval \
        --prompts=evaluation_metadata.jsonl --out=DIR
    python -m tokenflow_jax.sample --checkpoint=... --layout=dpg --prompts=FOLDER --out=DIR

Beside the pictures lies a JSON file with all that decides on them. Every picture depends on its
prompt, the seed and its number alone: the same command goes on where it was stopped, and several
hosts (--distributed) share the prompts.

Layouts: `plain` names files after prompts; `geneval` writes 00000/metadata.jsonl and
00000/samples/0000.png, which GenEval's scorer reads; `dpg` one 2 x 2 grid per prompt file,
named after it, which DPG-Bench's scorer reads (its JSON lies beside the folder).
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from PIL import Image

from tokenflow_jax import log as runlog
from tokenflow_jax.evals import command, reconstruction
from tokenflow_jax.generation import api as generation

LAYOUTS = ("plain", "geneval", "dpg")
RECIPE = "recipe.json"


@dataclasses.dataclass(frozen=True)
class Task:
    """One prompt and where its pictures go.

    Attributes:
      prompt: the text.
      name: file or folder that its pictures get.
      about: a benchmark's line on it, for its metadata file.
    """

    prompt: str
    name: str
    about: str = ""


def read_tasks(layout: str, prompts: Sequence[str], path: str | None) -> list[Task]:
    """The prompts of a command line.

    Args:
      layout: one of LAYOUTS.
      prompts: given one by one.
      path: file or folder of prompts, see `--prompts`.

    Raises:
      ValueError: none, or a file that cannot be read as what it should be; the line is named.
    """
    prompts = list(prompts)
    if layout != "plain" and not path:
        raise ValueError(f"--layout={layout} needs --prompts, the benchmark's own file or folder")
    if layout != "plain" and prompts:
        raise ValueError(f"--layout={layout} takes its prompts from --prompts alone")
    if layout == "dpg":
        files = sorted(pathlib.Path(path).glob("*.txt"))
        if not files:
            raise ValueError(f"--prompts={path} is no folder with .txt files, one per prompt")
        return [Task(_read(file).strip(), file.stem) for file in files]
    lines = _read(pathlib.Path(path)).splitlines() if path else []
    if layout == "geneval":
        rows = [line for line in lines if line.strip()]
        tasks = [Task(_prompt_of(row, path, i), f"{i:05d}", row) for i, row in enumerate(rows)]
    else:
        prompts += [line for line in lines if line.strip()]
        tasks = [Task(prompt, f"{i:05d}_{_slug(prompt)}") for i, prompt in enumerate(prompts)]
    if not tasks:
        raise ValueError("nothing to draw: give --prompt or --prompts")
    return tasks


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts: {path} cannot be read as UTF-8 text ({error})") from error


def _prompt_of(row: str, path: str | None, index: int) -> str:
    try:
        prompt = json.loads(row)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}, line {index + 1} is no JSON object with a prompt: {row[:60]!r}"
        ) from error
    return str(prompt)


def _slug(prompt: str) -> str:
    """A prompt as part of a file name, in any script."""
    return re.sub(r"\W+", "-", prompt).strip("-")[:40] or "empty"


def draw(
    generator: generation.Generator,
    tasks: Sequence[Task],
    out: str | os.PathLike,
    recipe: generation.Recipe,
    *,
    layout: str = "plain",
    images_per_prompt: int = 1,
    batch_size: int = 16,
    previews: bool = False,
) -> int:
    """Draws what is not there yet, and writes it.

    Args:
      generator: the model.
      tasks: of `read_tasks`.
      out: folder.
      recipe: how to draw.
      layout: one of LAYOUTS; "dpg" needs four pictures per prompt.
      images_per_prompt: how many.
      batch_size: pictures at a time.
      previews: also writes the pictures after every scale, for "plain".

    Returns:
      Number of pictures drawn by this process.

    Raises:
      ValueError: values that the model cannot do, or a folder with pictures of another recipe.
    """
    if images_per_prompt < 1 or batch_size < 1:
        raise ValueError(
            f"images_per_prompt {images_per_prompt} and batch_size {batch_size} must be at least 1"
        )
    if layout == "dpg" and images_per_prompt != 4:
        raise ValueError(f"DPG-Bench reads 2 x 2 grids: 4 pictures, not {images_per_prompt}")
    recipe.check(generator.config)
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    names = {task.name: _files(out, task, layout, images_per_prompt) for task in tasks}
    _write_recipe(generator.describe(recipe), tasks, names, out, layout)
    mine = tasks[jax.process_index() :: jax.process_count()]
    missing = [task for task in mine if not all(file.exists() for file in names[task.name])]
    if len(missing) < len(mine):
        runlog.log.info("%d prompts of %d are there already", len(mine) - len(missing), len(mine))
    done = 0
    for some in _chunks(missing, max(1, batch_size // images_per_prompt)):
        texts = [task.prompt for task in some for _ in range(images_per_prompt)]
        numbers = list(range(images_per_prompt)) * len(some)
        codes = generator.codes(texts, numbers, recipe, batch_size)
        grown = list(generator.previews(codes)) if previews else [generator.decode(codes)]
        for i, task in enumerate(some):
            own = slice(i * images_per_prompt, (i + 1) * images_per_prompt)
            _save(task, [images[own] for images in grown], names[task.name], layout)
        done += len(texts)
        runlog.log.info("%d of %d pictures", done, len(missing) * images_per_prompt)
    return done


def _files(out: pathlib.Path, task: Task, layout: str, count: int) -> list[pathlib.Path]:
    """The picture files of a prompt."""
    if layout == "dpg":
        return [out / f"{task.name}.png"]
    if layout == "geneval":
        return [out / task.name / "samples" / f"{i:04d}.png" for i in range(count)]
    return [out / f"{task.name}{f'_{i}' if count > 1 else ''}.png" for i in range(count)]


def _save(task: Task, grown: list[np.ndarray], files: list[pathlib.Path], layout: str) -> None:
    """Writes the pictures of a prompt; `grown` holds them after each scale, or at the end only."""
    images = grown[-1]
    if layout == "dpg":
        _, height, width, channels = images.shape
        grid = images.reshape(2, 2, height, width, channels).swapaxes(1, 2)
        images = grid.reshape(1, 2 * height, 2 * width, channels)
    if layout == "geneval":
        files[0].parent.mkdir(parents=True, exist_ok=True)
        (files[0].parents[1] / "metadata.jsonl").write_text(task.about + "\n", encoding="utf-8")
    for i, (image, file) in enumerate(zip(images, files, strict=True)):
        _write_png(image, file)
        if len(grown) > 1 and layout == "plain":
            row = reconstruction.grid([np.stack([step[i] for step in grown])])
            _write_png(row, file.with_name(f"{file.stem}_scales.png"))


def _write_png(image: np.ndarray, file: pathlib.Path) -> None:
    """Writes a picture that appears when it is complete."""
    partial = file.with_name(f".partial-{file.name}")
    Image.fromarray(image).save(partial, format="PNG")
    os.replace(partial, file)


def _write_recipe(
    recipe: dict[str, Any],
    tasks: Sequence[Task],
    names: dict[str, list[pathlib.Path]],
    out: pathlib.Path,
    layout: str,
) -> None:
    """Writes the JSON beside the pictures, or raises if those there were made otherwise."""
    path = out.with_name(f"{out.name}.{RECIPE}") if layout == "dpg" else out / RECIPE
    images = [
        {"file": file.relative_to(out).as_posix(), "prompt": task.prompt, "number": i}
        for task in tasks
        for i, file in enumerate(names[task.name])
    ]
    wanted = json.loads(json.dumps({"recipe": recipe, "layout": layout, "images": images}))
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in wanted if there.get(key) != wanted[key]]
        if changed:
            raise ValueError(
                f"{out} holds pictures drawn otherwise ({', '.join(changed)} differ, see {path}); "
                "choose another --out"
            )
    elif jax.process_index() == 0:
        text = json.dumps(wanted, indent=1, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8", errors="replace")


def _chunks(tasks: Sequence[Task], size: int) -> Iterator[Sequence[Task]]:
    for start in range(0, len(tasks), size):
        yield tasks[start : start + size]


def recipe_of_flags(default: generation.Recipe, options: flags.FlagValues) -> generation.Recipe:
    """The checkpoint's recipe with what the flags change.

    Raises:
      ValueError: flags that exclude each other.
    """
    filters = (options.top_k, options.top_p)
    if options.passes is not None and filters != (None, None):
        raise ValueError("--passes brings its own filters; give it or --top_k and --top_p")
    changes: dict[str, Any] = {"seed": options.seed}
    if options.guidance is not None:
        changes["guidance"] = options.guidance
    if options.negative_prompt is not None:
        changes["negative_prompt"] = options.negative_prompt
    if options.passes is not None:
        changes["passes"] = options.passes
    elif filters != (None, None):
        given = zip(filters, default.passes[0], strict=True)
        changes["passes"] = (tuple(own if flag is None else flag for flag, own in given),)
    return dataclasses.replace(default, **changes)


def main(options: flags.FlagValues = flags.FLAGS) -> None:
    """Draws what the flags ask for.

    Raises:
      ValueError: wrong flags, prompts or weights.
      OSError: the pictures cannot be written.
    """
    missing = [name for name in ("checkpoint", "out") if not options[name].value]
    if missing:
        raise ValueError(f"say {' and '.join('--' + name for name in missing)}")
    layout = options.layout
    tasks = read_tasks(layout, options.prompt, options.prompts)
    generator = generation.Generator.load(
        options.checkpoint,
        options.tokenizer,
        text_tokenizer=options.text_tokenizer,
        variant=options.variant,
        tokenizer_variant=options.tokenizer_variant,
        ema=options.ema,
        step=options.step,
        dtype=options.dtype,
    )
    images = options.images_per_prompt
    draw(
        generator,
        tasks,
        options.out,
        recipe_of_flags(generator.recipe, options),
        layout=layout,
        images_per_prompt=(1 if layout == "plain" else 4) if images is None else images,
        batch_size=options.batch_size,
        previews=options.previews,
    )
    for note in generator.prompts.cut_notes():
        runlog.log.warning("%s", note)
    runlog.log.info("pictures in %s", options.out)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Not at import: other commands have flags of the same names."""
    flags.DEFINE_string(
        "checkpoint",
        None,
        "The model: a workdir, one of its checkpoints, or a PyTorch checkpoint.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "variant", None, "Which model a PyTorch checkpoint holds.", flag_values=values
    )
    flags.DEFINE_string(
        "tokenizer",
        None,
        "The image tokenizer; a checkpoint of a training run knows where it was.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "tokenizer_variant",
        None,
        "Which model a PyTorch tokenizer holds.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "text_tokenizer",
        None,
        "A folder, bytes or words; a checkpoint of a training run knows.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "step", None, "Which checkpoint of a workdir; the newest by default.", flag_values=values
    )
    flags.DEFINE_bool(
        "ema", True, "Take the moving average of the weights if there is one.", flag_values=values
    )
    flags.DEFINE_enum(
        "dtype",
        "auto",
        ["auto", "float32", "bfloat16"],
        "What the model computes in.",
        flag_values=values,
    )
    flags.DEFINE_multi_string(
        "prompt", [], "What to draw; may be given several times.", flag_values=values
    )
    flags.DEFINE_string(
        "prompts",
        None,
        "File with one prompt per line; geneval: .jsonl; dpg: folder of .txt files.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "images_per_prompt",
        None,
        "Pictures of each prompt; by default 1, for the benchmarks 4.",
        flag_values=values,
    )
    flags.DEFINE_string("out", None, "Folder for the pictures.", flag_values=values)
    flags.DEFINE_enum("layout", "plain", LAYOUTS, "How files are named.", flag_values=values)
    flags.DEFINE_bool(
        "previews", False, "plain: also the pictures after every scale.", flag_values=values
    )
    flags.DEFINE_integer("seed", 0, "Of all draws.", flag_values=values)
    flags.DEFINE_float(
        "guidance", None, "Strength of guidance; 0 switches it off.", flag_values=values
    )
    flags.DEFINE_integer(
        "passes", None, "1, 2 or 3 passes with the reference's filters.", flag_values=values
    )
    flags.DEFINE_integer(
        "top_k", None, "One pass that keeps so many codes; 0: all.", flag_values=values
    )
    flags.DEFINE_float(
        "top_p", None, "One pass that keeps this probability; 0: all.", flag_values=values
    )
    flags.DEFINE_string(
        "negative_prompt", None, "What guidance leads away from.", flag_values=values
    )
    flags.DEFINE_integer(
        "batch_size", 16, "Pictures drawn at a time, per process.", flag_values=values
    )


def run() -> None:
    """Entry point of `python -m tokenflow_jax.sample`."""
    define_flags()
    command.run("sample", main)


if __name__ == "__main__":
    run()
