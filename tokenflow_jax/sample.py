r"""Draw pictures from text with a trained generation model.

    python -m tokenflow_jax.sample --checkpoint=runs/generation --prompt="red apple" --out=DIR
    python -m tokenflow_jax.sample --checkpoint=... --layout=geneval --out=DIR \
        --prompts=evaluation_metadata.jsonl

A picture depends on its prompt, the seed and its number alone; recipe.json beside the pictures
records the rest. The same command continues a stopped one, and hosts share the prompts. Layouts:
plain names files after prompts, geneval writes 00000/metadata.jsonl and 00000/samples/0000.png, dpg
one 2 x 2 grid per prompt file, as the benchmarks' scorers read them.
"""

import dataclasses
import functools
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags
from etils import epath

from tokenflow_jax import cli, files, remote
from tokenflow_jax.data import jsonl
from tokenflow_jax.data.examples import Broken, check_text
from tokenflow_jax.evals import pictures
from tokenflow_jax.log import Progress, compiling, log
from tokenflow_jax.messages import bullets, plain

if TYPE_CHECKING:  # loaded in main, so that --help is quick
    from tokenflow_jax.generation.api import Generator, Recipe
    from tokenflow_jax.generation.edit import Request

_MOST = 2**28  # bytes of a file of prompts
LAYOUTS = ("plain", "geneval", "dpg")
RECIPE = "recipe.json"


@dataclasses.dataclass(frozen=True)
class Task:
    """One prompt, the name of its file or folder, and a benchmark's metadata line about it."""

    prompt: str
    name: str
    about: str = ""


def read_tasks(layout: str, prompts: Sequence[str], path: str | None) -> list[Task]:
    """Return the tasks of a layout from single prompts and a file or folder of prompts."""
    prompts = list(prompts)
    if layout != "plain" and not path:
        raise ValueError(f"--layout={layout} needs --prompts, the benchmark's own file or folder")
    if layout != "plain" and prompts:
        raise ValueError(f"--layout={layout} takes its prompts from --prompts alone")
    if layout == "dpg":
        names = remote.names_in(path) if remote.kind_of(path) == "folder" else []
        found = [name for name in names if name.endswith(".txt") and not name.startswith(".")]
        if not found:
            raise ValueError(f"--prompts={path} is no folder with .txt files, one per prompt")
        tasks = [Task(_read(remote.join(path, n)).strip(), n.removesuffix(".txt")) for n in found]
        if empty := [plain(task.name) for task in tasks if not task.prompt]:
            raise ValueError(f"--prompts: files in {path} are empty:\n{bullets(empty)}")
        return tasks
    text = _read(path) if path else ""
    if layout == "geneval":
        rows = [(number, line) for number, _, line in jsonl.lines_of(io.BytesIO(text.encode()))]
        tasks = [
            Task(_prompt_of(line, f"{path}, line {number}"), f"{i:05d}", _joined(line))
            for i, (number, line) in enumerate(rows)
        ]
    else:
        rows = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
        tasks = [Task(p, f"{i:05d}_{_slug(p)}") for i, p in enumerate([*prompts, *rows])]
    if not tasks:
        where = f"; {path} has none" if path else ""
        raise ValueError(f"nothing to draw: give --prompt or --prompts{where}")
    return tasks


def _read(path: str) -> str:
    try:
        return files.read_bytes(path, _MOST).decode("utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: UTF-8, a pipe, gigabytes
        raise ValueError(f"--prompts: {path} cannot be read as UTF-8 text ({error})") from error


def _joined(line: bytes) -> str:
    return line.decode().strip().replace("\n", " ")  # an element of an array may have several


def _prompt_of(line: bytes, where: str) -> str:
    try:
        return check_text(jsonl.parse_object(line).get("prompt"), "the prompt")
    except Broken as error:
        raise ValueError(f"{where} is no JSON object with a prompt: {error}") from error


def _slug(prompt: str) -> str:
    """Turn a prompt, in any script, into part of a file name."""
    return re.sub(r"\W+", "-", prompt).strip("-")[:40] or "empty"


def draw(
    generator: "Generator",
    tasks: Sequence[Task],
    out: str | os.PathLike,
    recipe: "Recipe",
    *,
    layout: str = "plain",
    images_per_prompt: int = 1,
    batch_size: int = 16,
    previews: bool = False,
    asked: "Request | None" = None,
) -> int:
    """Draw and write the pictures that do not exist yet; return how many this process drew.

    Raises:
      ValueError: values that the model cannot do, or a folder with pictures of another recipe.
    """
    import jax

    if images_per_prompt < 1 or batch_size < 1:
        raise ValueError(
            f"images_per_prompt {images_per_prompt} and batch_size {batch_size} must be at least 1"
        )
    if layout == "dpg" and images_per_prompt != 4:
        raise ValueError(f"DPG-Bench reads 2 x 2 grids: 4 pictures, not {images_per_prompt}")
    recipe.check(generator.config)
    out = epath.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    names = {task.name: _files(out, task, layout, images_per_prompt) for task in tasks}
    edit, about = asked[:2] if asked else (None, None)
    about = generator.describe(recipe, about)
    _write_recipe(about, tasks, names, out, layout, jax.process_index() == 0)
    mine = tasks[jax.process_index() :: jax.process_count()]
    missing = [task for task in mine if not all(file.exists() for file in names[task.name])]
    if len(missing) < len(mine):
        log.info("%d prompts of %d are already drawn", len(mine) - len(missing), len(mine))
    done, step = 0, max(1, batch_size // images_per_prompt)
    line = Progress("draw", len(missing) * images_per_prompt, "pictures")
    for start in range(0, len(missing), step):
        some = missing[start : start + step]
        texts = [task.prompt for task in some for _ in range(images_per_prompt)]
        numbers = list(range(images_per_prompt)) * len(some)
        codes = generator.codes(texts, numbers, recipe, batch_size, edit)
        grown = list(generator.previews(codes)) if previews else [generator.decode(codes)]
        for i, task in enumerate(some):
            own = slice(i * images_per_prompt, (i + 1) * images_per_prompt)
            _save(task, [images[own] for images in grown], names[task.name], layout)
            if edit is not None and layout == "plain":
                for image, file in zip(grown[-1][own], names[task.name], strict=True):
                    row = asked.row(generator.tokenizer, image)
                    pictures.write_png(row, file.with_name(f"{file.stem}_edit.png"))
        done += len(texts)
        (line.update if start else line.restart)(done)  # everything compiles in the first batch
    return done


def _files(out: epath.Path, task: Task, layout: str, count: int) -> list[epath.Path]:
    """Return the picture files of a prompt."""
    if layout == "dpg":
        return [out / f"{task.name}.png"]
    if layout == "geneval":
        return [out / task.name / "samples" / f"{i:04d}.png" for i in range(count)]
    return [out / f"{task.name}{f'_{i}' if count > 1 else ''}.png" for i in range(count)]


def _save(task: Task, grown: list[np.ndarray], files: list[epath.Path], layout: str) -> None:
    """Write the pictures of a prompt; `grown` holds them after each scale, or at the end only."""
    images = grown[-1]
    if layout == "dpg":
        images = pictures.grid(images.reshape(2, 2, *images.shape[1:]), gap=0)[None]
    if layout == "geneval":
        files[0].parent.mkdir(parents=True, exist_ok=True)
        about = files[0].parents[1] / "metadata.jsonl"
        about.write_text(task.about + "\n", encoding="utf-8")
    for i, (image, file) in enumerate(zip(images, files, strict=True)):
        pictures.write_png(image, file)
        if len(grown) > 1 and layout == "plain":
            row = pictures.grid([np.stack([step[i] for step in grown])])
            pictures.write_png(row, file.with_name(f"{file.stem}_scales.png"))


def _write_recipe(
    recipe: dict[str, Any],
    tasks: Sequence[Task],
    names: dict[str, list[epath.Path]],
    out: epath.Path,
    layout: str,
    is_first: bool,
) -> None:
    """Write the JSON beside the pictures, or raise if existing ones have another recipe."""
    # DPG-Bench's scorer takes every file in the folder for a picture.
    path = out.with_name(f"{out.name}.{RECIPE}") if layout == "dpg" else out / RECIPE
    images = [
        {"file": file.relative_to(out).as_posix(), "prompt": task.prompt, "number": i}
        for task in tasks
        for i, file in enumerate(names[task.name])
    ]
    wanted = json.loads(json.dumps({"recipe": recipe, "layout": layout, "images": images}))
    text = json.dumps(wanted, indent=1, ensure_ascii=False) + "\n"
    data = text.encode(errors="backslashreplace")  # halves of surrogate pairs
    if path.exists() and files.read_bytes(path, _MOST) != data:
        there = files.read_json(path, remedy="; choose another --out")
        changed = [key for key in wanted if there.get(key) != wanted[key]]
        if changed:
            raise ValueError(
                f"{out} holds pictures drawn with other settings ({', '.join(changed)} differ, see "
                f"{path}); choose another --out"
            )
    elif is_first:
        path.write_bytes(data)


def recipe_of_flags(default: "Recipe", options: flags.FlagValues) -> "Recipe":
    """Return the checkpoint's recipe with the changes of the flags."""
    filters = (options.top_k, options.top_p)
    if options.passes is not None and filters != (None, None):
        raise ValueError("--passes brings its own filters; give it or --top_k and --top_p")
    changes = {name: options[name].value for name in ("guidance", "negative_prompt", "passes")}
    if filters != (None, None):
        given = zip(filters, default.passes[0], strict=True)
        changes["passes"] = (tuple(own if flag is None else flag for flag, own in given),)
    changes = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(default, seed=options.seed, **changes)


def main(options: flags.FlagValues) -> None:
    cli.require(options, "checkpoint", "out")
    tasks = read_tasks(options.layout, options.prompt, options.prompts)
    try:
        outpaint = [float(part) for part in options.outpaint]
    except ValueError as error:
        raise ValueError(f"--outpaint={','.join(options.outpaint)}: give 4 numbers") from error
    files.writable_folder(options.out)
    log.info("%s", compiling(f"loading {options.checkpoint} and compiling", 30))
    from tokenflow_jax.generation.edit import request
    from tokenflow_jax.unified.api import load_generator

    names = ("text_tokenizer", "variant", "tokenizer_variant", "ema", "step", "dtype",
             "weights_dtype")  # fmt: skip
    known = {name: options[name].value for name in names}
    generator = load_generator(options.checkpoint, options.tokenizer, **known)
    edits = {name: options[name].value for name in ("image", "mask", "strength", "keep")}
    asked = request(generator.tokenizer, **edits, outpaint=outpaint)
    if asked.edit is not None and not asked.mask_HW.any():
        raise ValueError(f"--mask={options.mask} is black: paint white what is to change")
    count = draw(
        generator,
        tasks,
        options.out,
        recipe_of_flags(generator.recipe, options),
        layout=options.layout,
        images_per_prompt=options.images_per_prompt or (1 if options.layout == "plain" else 4),
        batch_size=options.batch_size,
        previews=options.previews,
        asked=asked,
    )
    for note in generator.prompts.cut_notes():
        log.warning("%s", note)
    log.info("drew %d pictures, in %s", count, options.out)


def define_flags(define: cli.Define) -> None:
    define.string("checkpoint", None, "A workdir, one of its checkpoints, or a PyTorch checkpoint.")
    define.string("variant", None, "Which model a PyTorch checkpoint holds.")
    define.integer("step", None, "Which checkpoint of a workdir; the newest by default.")
    define.bool("ema", True, "Take the moving average of the weights if there is one.")
    define.enum("dtype", "auto", ["auto", "float32", "bfloat16"], "Compute in.")
    define.enum("weights_dtype", "", ["", "int8", "int4", "nf4"], "Of the decoder's layers.")
    define.string("tokenizer", None, "The image tokenizer; a training run knows it.")
    define.string("tokenizer_variant", None, "Which model a PyTorch tokenizer holds.")
    define.string("text_tokenizer", None, "A folder or a built-in one; a training run knows it.")
    define.multi_string("prompt", [], "What to draw; may be repeated.")
    define.string("prompts", None, "One prompt per line; geneval: .jsonl; dpg: folder of .txt.")
    define.integer("images_per_prompt", None, "By default 1, for the benchmarks 4.", 1)
    define.string("image", None, "To edit, with --mask, --strength, --keep or --outpaint.")
    define.string("mask", None, "A picture of the same aspect, white where the image changes.")
    define.float("strength", None, "0 to 1: the part of the scales that is drawn again.")
    define.integer("keep", None, "The same as a number of coarsest scales that are kept.", 0)
    define.list("outpaint", [], "Extend --image by parts of its size: left,top,right,bottom.")
    define.string("out", None, "Folder for the pictures.")
    define.enum("layout", "plain", LAYOUTS, "Names of the files.")
    define.bool("previews", False, "plain: also the pictures after every scale.")
    define.integer("seed", 0, "Seed of all random choices.")
    define.float("guidance", None, "Strength of guidance; 0 switches it off.")
    define.integer("passes", None, "1, 2 or 3 passes with the reference's filters.")
    define.integer("top_k", None, "One pass that keeps the k likeliest codes; 0: all.")
    define.float("top_p", None, "One pass that keeps this probability; 0: all.")
    define.string("negative_prompt", None, "Guidance leads away from it.")
    define.integer("batch_size", 16, "Pictures at a time, per process.")


run = functools.partial(cli.run, "sample", main, define_flags)

if __name__ == "__main__":
    sys.exit(run())
