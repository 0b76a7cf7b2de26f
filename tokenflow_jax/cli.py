"""The --config flag of all programs: a file, a variant and overrides, with clear errors."""

import ast
import difflib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import ml_collections
from absl import app, flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with an optional variant: configs/tokenizer.py:b"
)


def config_file() -> str:
    """The value of --config, `path/to/name.py` or `path/to/name.py:variant`."""
    return config_flags.get_config_filename(flags.FLAGS["config"])


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; whatever is wrong with it is one line on stderr and exit code 2."""
    wants_help = any(arg.lstrip("-") in ("help", "helpfull", "helpshort") for arg in argv)
    if not wants_help:
        check_config_arguments(argv)
    try:
        return app.parse_flags_with_usage(argv) if wants_help else flags.FLAGS(argv)
    except flags.Error as error:
        fail(" ".join(str(error).split("Traceback")[0].split()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        fail(f"wrong --config flag: {' '.join(str(error).split())}")


def check_config_arguments(argv: Sequence[str]) -> None:
    """Loads the config file and checks every --config.<key>=<value> against it.

    ml_collections would report these mistakes as tracebacks. Exits with code 2 on the first one.
    """
    arguments = [arg.lstrip("-") for arg in argv[1:] if arg.startswith("-")]
    values = {a.partition("=")[0]: a.partition("=")[2] for a in arguments}
    config_file = values.get("config")
    if config_file == "" and "--config" in argv[:-1]:  # the form with a space
        config_file = argv[list(argv).index("--config") + 1]
    if not config_file:
        near = difflib.get_close_matches("config", [a for a in values if "." not in a], n=1)
        hint = f" (--{near[0]} is not an option)" if near else ""
        fail(f"say what to train with --config=configs/tokenizer.py{hint}; --help tells more")
    config = _load_config(config_file)
    keys = _key_types(config)
    for argument in arguments:
        name, has_value, text = argument.partition("=")
        if not name.startswith("config."):
            continue
        key = name.removeprefix("config.")
        if key not in keys:
            near = _nearest_key(key, list(keys))
            hint = f"; did you mean config.{near}?" if near else ""
            fail(f"there is no config.{key} in {config_file}{hint}")
        if has_value:
            _check_value(key, text, keys[key])


def _nearest_key(key: str, keys: Sequence[str]) -> str | None:
    """The closest key by its whole dotted name, else by its last part alone (a wrong section)."""
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if near:
        return near[0]
    by_name = {k.split(".")[-1]: k for k in keys}
    near = difflib.get_close_matches(key.split(".")[-1], list(by_name), n=1, cutoff=0.7)
    return by_name[near[0]] if near else None


def _load_config(config_file: str) -> Any:
    """Runs get_config of the file; a missing file or a wrong variant ends the program."""
    path, _, variant = config_file.partition(":")
    if not os.path.isfile(path):
        folder = Path(path).parent if Path(path).parent.is_dir() else Path("configs")
        there = sorted(str(p) for p in folder.glob("*.py"))
        near = difflib.get_close_matches(path, there, n=1, cutoff=0.5)
        hint = (
            f"; did you mean {near[0]}?"
            if near
            else (f"; there are: {', '.join(there)}" if there else "")
        )
        fail(f"there is no config file {path}{hint}")
    spec = importlib.util.spec_from_file_location("_tokenflow_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.get_config(variant) if variant else module.get_config()
    except ValueError as error:
        fail(f"{path}: {error}")


def _key_types(config: Any, prefix: str = "") -> dict[str, type]:
    """Dotted key -> type of every value and section of a ConfigDict."""
    types: dict[str, type] = {}
    for key in config:
        types[f"{prefix}{key}"] = config.get_type(key)
        if isinstance(config[key], ml_collections.ConfigDict):
            types.update(_key_types(config[key], f"{prefix}{key}."))
    return types


_EXAMPLES: dict[type, str] = {int: "1000", float: "1e-4", bool: "true or false", tuple: "(1,2,4)"}


def _check_value(key: str, text: str, kind: type) -> None:
    """Checks a number, flag or tuple before ml_collections does, with a friendlier message."""
    parsers: dict[type, Callable[[str], Any]] = {
        int: int, float: float, bool: _parse_bool, tuple: _parse_tuple, list: _parse_tuple,
    }  # fmt: skip
    if kind not in parsers:
        return
    try:
        parsers[kind](text)
    except (ValueError, SyntaxError):
        hint = _EXAMPLES.get(kind, "[1,2,4]")
        try:
            if kind is int and float(text) == int(float(text)):
                hint = str(int(float(text)))
        except (ValueError, OverflowError):
            pass
        fail(f"config.{key} takes a value of type {kind.__name__}, such as {hint}, not {text!r}")


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false", "t", "f", "1", "0", "y", "n", "yes", "no"):
        raise ValueError(text)
    return text.lower() in ("true", "t", "1", "y", "yes")


def _parse_tuple(text: str) -> Any:
    return ast.literal_eval(text)


def fail(message: str) -> NoReturn:
    """Prints one line and ends the program with code 2."""
    print(f"tokenflow_jax: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)
