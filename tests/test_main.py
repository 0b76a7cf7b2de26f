"""The command line: a mistake is one clear line; the workdir follows from the config."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import ml_collections
import pytest

from tokenflow_jax import cli, files, main, stages
from tokenflow_jax.tokenizer.stage import TokenizerStage
from tokenflow_jax.train import loop

REPOSITORY = Path(__file__).parents[1]
CONFIG = """
import ml_collections

VARIANTS = ("b", "tiny")

def get_config(variant=""):
    if variant not in ("", *VARIANTS):
        raise ValueError(f"there is no variant {variant!r}; the variants are {', '.join(VARIANTS)}")
    config = ml_collections.ConfigDict()
    config.stage = "toy"
    config.seed = 0
    config.total_steps = 100
    config.learning_rate = 1e-4
    config.model = ml_collections.ConfigDict({"width": 8, "scales": (1, 2), "name": "x"})
    config.ema = True
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(CONFIG)
    return path


def call(*arguments, cwd=REPOSITORY):
    """Run the program as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "tokenflow_jax.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=300,
    )


def program(*arguments):
    """Parse the program's arguments and do nothing; returns the exit code."""
    return cli.run("tokenflow_jax", lambda options: None, main.define_flags,
                   list(map(str, arguments)), config=True, runtime=False)  # fmt: skip


def complaint(capsys, *arguments):
    """Return the one line that the program prints for wrong arguments."""
    assert program(*arguments) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


@pytest.mark.parametrize(
    ("argument", "texts"),
    [
        ("--config.model.widht=3", ["no config.model.widht", "did you mean config.model.width?"]),
        ("--config.modle.width=3", ["did you mean config.model.width?"]),
        ("--config.width=3", ["did you mean config.model.width?"]),
        ("--config.learning_rat=3", ["did you mean config.learning_rate?"]),
        ("--config.zzz=3", ["no config.zzz"]),
        ("--config.total_steps=1e3", ["config.total_steps", "type int", "1000", "'1e3'"]),
        ("--config.total_steps=ten", ["type int", "'ten'"]),
        ("--config.learning_rate=fast", ["type float", "'fast'"]),
        ("--config.ema=maybe", ["type bool", "'maybe'"]),
        ("--config.model.scales=(1,", ["type tuple", "(1,2,4)"]),
    ],
)
def test_a_wrong_override_is_one_line(config_file, capsys, argument, texts):
    text = complaint(capsys, f"--config={config_file}", argument)
    for expected in texts:
        assert expected in text


def test_wrong_files_and_variants_are_one_line(config_file, capsys):
    folder = config_file.parent
    assert f"did you mean {config_file}?" in complaint(capsys, f"--config={folder}/toi.py")
    assert "the variants are b, tiny" in complaint(capsys, f"--config={config_file}:c")
    assert "say what to train with --config=" in complaint(capsys)
    assert "--confg is not an option" in complaint(capsys, f"--confg={config_file}")


def test_right_arguments_pass(config_file):
    arguments = ["--config.model.scales=(1,)", "--config.learning_rate=3", "--config.ema=false"]
    assert program(f"--config={config_file}:tiny", *arguments) == 0
    assert program("--config", config_file, "--workdir=x") == 0


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--config.model.widht=3"], ["did you mean config.model.width?"]),
        (["--wrokdir=x"], ["wrokdir"]),
        (["--config.seed"], ["config.seed"]),
        (["--config.model=3"], ["config.model"]),
        (["stray"], ["unexpected argument 'stray'"]),
        ([], ["config.stage is 'toy'; the stages available are: "]),
        (["--config.stage=tokenizer", "--config.total_steps=0"], ["total_steps=0 must be"]),
    ],
)
def test_the_program_exits_with_one_line_and_code_2(config_file, arguments, texts):
    result = call(f"--config={config_file}", *arguments)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    for text in texts:
        assert text in result.stderr


def test_help_tells_what_there_is():
    result = call("--help")
    assert "--config=configs/tokenizer.py" in result.stdout
    assert "--workdir" in result.stdout and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("config_file", "workdir"),
    [
        ("configs/tokenizer.py", "runs/tokenizer"),
        ("configs/tokenizer.py:b_256_enhanced", "runs/tokenizer-b_256_enhanced"),
        ("/elsewhere/x.py:b,runlocal", "runs/x-b-runlocal"),
        ("tokenizer", "runs/tokenizer"),
        ("tokenizer:b_256_enhanced", "runs/tokenizer-b_256_enhanced"),
    ],
)
def test_default_workdir_is_the_same_each_time(config_file, workdir):
    assert main.default_workdir(config_file) == workdir


def test_stage_names():
    config = ml_collections.ConfigDict({"stage": "tokenizer"})
    assert stages.stage_class(config.stage) == "tokenflow_jax.tokenizer.stage:TokenizerStage"
    with pytest.raises(ValueError, match=r"stages available are: .*tokenizer"):
        stages.stage_class("understandng")


def call_with_toy_stage(*arguments, cwd):
    """Run the program with the toy stage of the loop's tests among its stages."""
    toy = REPOSITORY / "tests" / "helpers"
    code = (
        "import sys\n"
        "from tokenflow_jax import main, stages\n"
        "stages.STAGES['toy'] = 'toy_stage:ToyStage'\n"
        "sys.exit(main.run())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, f"--config={toy / 'toy_stage.py'}", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{toy}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_same_command_trains_and_continues(tmp_path):
    overrides = ("--config.data_delay=0.0", "--config.checkpoint_every=5")
    process = call_with_toy_stage("--config.total_steps=10", *overrides, cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "step 10/10  total" in out and "images/s" in out and "eta" in out
    assert (tmp_path / "runs" / "toy_stage" / "report.html").exists()
    assert err == ""  # no noise from libraries
    process = call_with_toy_stage("--config.total_steps=12", *overrides, cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "continued from checkpoint runs/toy_stage/checkpoints/10" in out.replace(
        f"{tmp_path}/", ""
    )
    process = call_with_toy_stage("--config.total_steps=12", *overrides, cwd=tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "done at step 12" in out and out.count("\n") == 1  # nothing was loaded


def test_a_failed_run_ends_with_code_1_and_one_line(tmp_path):
    process = call_with_toy_stage("--config.nan_at=7", cwd=tmp_path)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert err.count("\n") == 1 and "step 7: loss/total not finite" in err


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    process = call_with_toy_stage("--workdir=file/run", cwd=tmp_path)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert err.count("\n") == 1 and "the workdir file/run cannot be used" in err


@pytest.mark.parametrize(
    ("number", "scheduler_s", "code"),
    [(signal.SIGINT, None, 130), (signal.SIGTERM, None, 0), (signal.SIGTERM, "143", 143)],
)
def test_signals_save_and_end_with_their_code(tmp_path, monkeypatch, number, scheduler_s, code):
    if scheduler_s:
        monkeypatch.setenv("TOKENFLOW_SIGTERM_CODE", scheduler_s)
    process = call_with_toy_stage("--config.step_delay=0.1", cwd=tmp_path)
    for line in process.stdout:
        if "step  5/40" in line:
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert f"stopped by {number.name} at step" in out
    assert "Traceback" not in err


def start(arguments):
    """Run the program in this process, which is of no distributed run."""
    return cli.run("tokenflow_jax", main.main, main.define_flags, arguments, config=True,
                   runtime=False)  # fmt: skip


@pytest.mark.parametrize(
    ("workdir", "code", "reason"),
    [("/dev/null/x", 1, "Not a directory"), ("FILE", 1, "File exists"), ("a[1]", 2, "because of")],
)
def test_a_workdir_that_cannot_be_used_is_one_line_before_anything_is_loaded(
    tmp_path, capsys, monkeypatch, workdir, code, reason
):
    (tmp_path / "FILE").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TokenizerStage, "open", lambda stage: pytest.fail("loads"))
    assert start([f"--config={REPOSITORY}/configs/tokenizer.py", f"--workdir={workdir}"]) == code
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and reason in error and workdir in error


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (PermissionError(13, "Permission denied", "/data/x.jsonl"), 1),
        (OSError(5, "Input/output error"), 1),
        (OSError(28, "No space left on device", "x"), 1),
        (files.parse_json, 1),  # raises a ValueError of the package
        (ValueError("of a library"), 6),
        (RuntimeError("a bug"), 6),
    ],
)
def test_errors_while_training_are_one_line_unless_they_may_be_bugs(
    tmp_path, capsys, monkeypatch, error, lines
):
    def train(*unused):
        if callable(error):
            error(b"[", "data.jsonl, line 7")
        raise error

    monkeypatch.setattr(TokenizerStage, "open", lambda stage: stage)
    monkeypatch.setattr(loop, "train_and_evaluate", train)
    configuration = f"--config={REPOSITORY}/configs/tokenizer.py"
    assert start([configuration, f"--workdir={tmp_path}"]) == 1
    text = capsys.readouterr().err.strip()
    assert text.count("\n") + 1 >= lines and (text.count("\n") == 0) == (lines == 1)
    assert text.split(" ", 1)[1].startswith("ERROR ")
    assert ("Traceback" in text) == (lines > 1)
