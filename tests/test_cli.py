"""The shared command line: help on one screen, one-line errors, configs by file and by name."""

import os
import pathlib
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from tokenflow_jax import cli, config_flag

ROOT = pathlib.Path(__file__).parents[1]
MODULES = (
    "main", "sample", "answer", "encode", "convert", "export", "preflight", "evals.reconstruction",
    "evals.fid", "evals.understanding", "data.prepare", "data.validate",
)  # fmt: skip
HELP = """
import runpy, sys
sys.argv = [sys.argv[1], *sys.argv[2:]]
try:
    runpy.run_module("tokenflow_jax." + sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as end:
    print("exit", end.code, "heavy", sorted({"jax", "flax", "grain"} & set(sys.modules)))
"""
CONFIG = """
import pathlib

import ml_collections

with open(pathlib.Path(__file__).parent / "runs.txt", "a") as file:
    file.write("x")

def get_config():
    return ml_collections.ConfigDict({"stage": "toy", "sizes": (1, 2), "rate": 1.0, "ema": True})
"""


def help_of(module, *arguments):
    run = [sys.executable, "-c", HELP, module, *arguments, "--help"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, env=env, check=True)
    assert not done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("module", MODULES)
def test_help_is_one_screen_and_loads_no_jax(module):
    *lines, end = help_of(module)
    assert end == "exit 0 heavy []"
    assert 10 < len(lines) <= 45 and max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert f"tokenflow_jax.{module}" in text  # an example
    assert "--verbosity" not in text and "--pdb" not in text  # absl's own


def test_help_lists_flags_defaults_and_variants():
    text = "\n".join(help_of("sample"))
    assert "--[no]ema" in text and "Pictures at a time, per process. [16]" in text
    text = "\n".join(help_of("main"))
    assert "--workdir" in text and "b_256_enhanced" in text and "qwen2_5_14b" in text
    text = "\n".join(help_of("preflight", "--config=generation"))
    assert "LLaMA-2 7B" in text and "b_256_enhanced" not in text


def define_flags(define):
    define.string("kind", None, "A word.")
    define.integer("count", 3, "A number.", 1)
    define.bool("fast", True, "A switch.")
    define.list("parts", ["a", "b"], "Words.")


def call(*arguments, main=lambda options: None, **settings):
    return cli.run("tool", main, define_flags, arguments, runtime=False, **settings)


def test_main_gets_the_flags_and_gives_the_exit_code():
    seen = []

    def main(options):
        seen.append((options.kind, options.count, options.fast, options.parts))
        return options.count

    assert call("--kind=x", "--count", "7", "--nofast", main=main) == 7
    assert call(main=lambda options: None) == 0
    assert call("word", main=main, positional="kind") == 3
    assert seen == [("x", 7, False, ["a", "b"]), ("word", 3, True, ["a", "b"])]


def fails(error):
    def main(options):
        raise error

    return main


@pytest.mark.parametrize(
    ("arguments", "main", "message"),
    [
        (["--kindd=x"], None, "Unknown command line flag 'kindd'. Did you mean: kind ?"),
        (["--count=x"], None, "--count=x"),
        (["--count=0"], None, "--count=0"),
        (["word"], None, "unexpected argument 'word'; options begin with --"),
        ([], fails(ValueError("k is 3, at most 2")), "k is 3, at most 2"),
        ([], fails(PermissionError(13, "Permission denied", "x")), "Permission denied: 'x'"),
        ([], lambda options: cli.require(options, "count", "kind"), "missing --kind"),
    ],
)
def test_mistakes_are_one_line_and_code_2(capsys, arguments, main, message):
    assert call(*arguments, **({"main": main} if main else {})) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("tool: ") and err.count("\n") == 1 and message in err


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        call(main=lambda options: 1 / 0)


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CONFIG)
    return path


def config_of(*arguments):
    """The name and the config that a program gets."""
    found = []

    def main(options):
        found.append((config_flag.name(options), options.config))

    assert call(*arguments, main=main, config=True) == 0
    return found[0]


def test_a_config_file_runs_once(config_file):
    overrides = ("--config.rate=2", "--config.sizes=(3,)", "--noconfig.ema")
    name, config = config_of(f"--config={config_file}", *overrides)
    assert (config_file.parent / "runs.txt").read_text() == "x"
    assert name == str(config_file)
    assert (config.rate, config.sizes, config.ema, config.stage) == (2.0, (3,), False, "toy")
    with pytest.raises(AttributeError):
        config.another = 1  # it is locked


@pytest.mark.parametrize("name", ["tokenizer", "configs/tokenizer.py"])
def test_shipped_configs_are_found_from_anywhere(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    found, config = config_of(f"--config={name}:b")
    assert found == f"{name}:b" and config.model.codebook_size == 32_768


@pytest.mark.parametrize("name", ["tokenizer", "generation", "understanding", "unified"])
def test_every_key_of_a_config_is_a_flag(name):
    """Also one with the name of a method, which ml_collections would take for the value."""
    _, config = config_of(f"--config={name}")
    values = {key: value for key, value in flat(config) if not isinstance(value, ConfigDict)}
    found = config_of(f"--config={name}", *(f"--config.{k}={v}" for k, v in values.items()))[1]
    assert dict(flat(found)) == dict(flat(config)) and len(values) > 60


def flat(config, prefix=""):
    for key, value in config.items():
        yield f"{prefix}{key}", value
        if isinstance(value, ConfigDict):
            yield from flat(value, f"{prefix}{key}.")


def test_a_file_of_the_user_s_comes_first(config_file, monkeypatch, capsys):
    monkeypatch.chdir(config_file.parent)
    config_file.rename("tokenizer")
    assert config_of("--config=tokenizer")[1].stage == "toy"
    pathlib.Path("configs").mkdir()  # then configs/ is the user's own
    assert call("--config=configs/tokenizer.py", config=True) == 2
    assert "there is no config file configs/tokenizer.py" in capsys.readouterr().err
    assert call("--config=generatoin", config=True) == 2
    assert "did you mean generation?" in capsys.readouterr().err


def test_a_process_may_run_several_commands(capsys):
    for _ in range(2):
        assert cli.run("tool", lambda options: None, lambda define: None, ["--bath=1"]) == 2
        assert "Unknown command line flag 'bath'" in capsys.readouterr().err
