"""The shipped config files as modules, loaded from `configs/` as the command line loads them."""

import importlib.util
import pathlib

FOLDER = pathlib.Path(__file__).parents[2] / "configs"


def load(name):
    """The module of configs/`name`.py."""
    spec = importlib.util.spec_from_file_location(f"{name}_config", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tokenizer, generation, understanding, unified = map(
    load, ("tokenizer", "generation", "understanding", "unified")
)
