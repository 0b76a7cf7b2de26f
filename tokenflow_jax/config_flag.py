"""The --config flag: a file or a shipped config's name, a variant and overrides, checked first.

ml_collections parses the overrides; it would report mistakes as tracebacks.
"""

import ast
import difflib
import itertools
import re
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from tokenflow_jax.train.run_config import RENAMED

_FOLDER = Path(__file__).parent / "configs"  # of a wheel
if not _FOLDER.is_dir():  # a checkout or an editable install
    _FOLDER = Path(__file__).parents[1] / "configs"


def define(options: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define --config with the config of the command line, which is loaded and checked here.

    Raises:
      ValueError: no such file, variant or key, or a value of another type.
    """
    file = _argument(argv)
    config = _checked(argv, file)
    config_flags.DEFINE_config_file("config", None, flag_values=options, sys_argv=list(argv))
    options["config"].parser.parse = lambda _: config  # the file runs once


def name(options: flags.FlagValues) -> str:
    """Return the value of --config, such as `tokenizer:b` or `configs/tokenizer.py:b`."""
    return config_flags.get_config_filename(options["config"])


def describe(argv: Sequence[str]) -> tuple[str, list[tuple[str, str]]]:
    """Return a title and the variants of argv's config, or of all shipped configs, by names."""
    if file := _argument(argv):
        path = _find(file.partition(":")[0])
        return f"Variants of {path}:", _variants(path) or [("(none)", "")]
    paths = sorted(_FOLDER.glob("*.py"))
    rows = [(p.stem, ", ".join(name for name, _ in _variants(p)[1:])) for p in paths]
    return "Configs and their variants (--config=NAME --help tells more):", rows


def _variants(path: Path) -> list[tuple[str, str]]:
    """Return the table after "Variants" in a config's docstring, without running the file."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.findall(r"^ {4}(\S.*?) {2,}(.+)$", doc.partition("\nVariants")[2], re.MULTILINE)


def _argument(argv: Sequence[str]) -> str | None:
    """Return the value of --config, given with "=" or a space; the last one counts."""
    found = None
    for argument, following in itertools.pairwise([*argv[1:], ""]):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config"):
            found = value if equals else following
    return found or None


def _checked(argv: Sequence[str], file: str | None) -> Any:
    """Load the config and check every --config.<key>=<value> against it."""
    given = [argument.lstrip("-") for argument in argv[1:] if argument.startswith("-")]
    if file is None:
        flag_names = [argument.partition("=")[0] for argument in given]
        near = _nearest("config", [flag for flag in flag_names if "." not in flag])
        hint = f" (--{near} is not an option)" if near else ""
        raise ValueError(
            f"say what to train with --config=configs/tokenizer.py{hint}; --help tells more"
        )
    config = _load(file)
    types = _key_types(config)
    by_last_part = {key.split(".")[-1]: key for key in types}
    for argument in given:
        flag, equals, text = argument.partition("=")
        if not flag.startswith("config."):
            continue
        key = flag.removeprefix("config.")
        if key in RENAMED and key not in types:
            raise ValueError(f"config.{key} is now config.{RENAMED[key]}")
        if key not in types:
            near = _nearest(key, types) or by_last_part.get(
                _nearest(key.split(".")[-1], by_last_part, cutoff=0.7)  # another section's
            )
            hint = f"; did you mean config.{near}?" if near else ""
            raise ValueError(f"there is no config.{key} in {file}{hint}")
        if equals:
            _check_value(key, text, types[key])
    return config


def _nearest(word: str, words: Sequence[str], cutoff: float = 0.6) -> str | None:
    return next(iter(difflib.get_close_matches(word, words, n=1, cutoff=cutoff)), None)


def _find(name: str) -> Path:
    """Return the file of a config: the user's own, else a shipped one by its name."""
    path = Path(name)
    if path.is_file():
        return path
    shipped, folder = _FOLDER / f"{path.stem}.py", path.parent
    is_name = path.name == name and not path.suffix
    # The docs say configs/tokenizer.py, which outside a checkout means the shipped file.
    if (is_name or (folder == Path("configs") and not folder.is_dir())) and shipped.is_file():
        return shipped
    there = [str(p) for p in sorted(folder.glob("*.py"))] if path.name != name else []
    there = there or [p.stem for p in sorted(_FOLDER.glob("*.py"))]
    near = _nearest(name, there, cutoff=0.5)
    hint = f"did you mean {near}?" if near else f"there are: {', '.join(there)}"
    raise ValueError(f"there is no config file {name}; {hint}")


def _load(file: str) -> Any:
    name, _, variant = file.partition(":")
    path = _find(name)
    get_config = runpy.run_path(str(path))["get_config"]  # a file with any suffix
    try:
        config = get_config(variant) if variant else get_config()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    config.lock()  # so that no stage adds a key by mistake
    return config


def _key_types(config: Any, prefix: str = "") -> dict[str, type]:
    """Return dotted key -> type of every value and section of a ConfigDict."""
    types: dict[str, type] = {}
    for key in config:
        types[f"{prefix}{key}"] = config.get_type(key)
        if isinstance(config[key], ml_collections.ConfigDict):
            types.update(_key_types(config[key], f"{prefix}{key}."))
    return types


def _check_value(key: str, text: str, kind: type) -> None:
    """Check a number, flag or tuple before ml_collections does, with a friendlier message."""
    parse, example = _PARSERS.get(kind, (str, ""))
    try:
        parse(text)
    except (ValueError, SyntaxError) as error:
        if kind is int and re.fullmatch(r"\d+(\.0*)?(e\d+)?", text):  # 1e3, 5.0
            example = str(int(float(text)))
        raise ValueError(
            f"config.{key} takes a value of type {kind.__name__}, such as {example}, not {text!r}"
        ) from error


def _parse_bool(text: str) -> None:
    if text.lower() not in ("true", "false", "t", "f", "1", "0", "y", "n", "yes", "no"):
        raise ValueError(text)


_PARSERS: dict[type, tuple[Callable[[str], Any], str]] = {  # and an example
    int: (int, "1000"),
    float: (float, "1e-4"),
    bool: (_parse_bool, "true or false"),
    tuple: (ast.literal_eval, "(1,2,4)"),
    list: (ast.literal_eval, "[1,2,4]"),
}
