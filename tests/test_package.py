"""The package as a user installs it: in a fresh environment, outside the checkout."""

import os
import pathlib
import shutil
import subprocess
import sys
import venv

import pytest

ROOT = pathlib.Path(__file__).parents[1]
COMMANDS = (
    "train", "sample", "answer", "encode", "convert", "export", "preflight",
    "evaluate-reconstruction",
    "evaluate-fid", "evaluate-understanding", "prepare", "validate",
)  # fmt: skip
pytestmark = pytest.mark.slow


def run(*command, cwd, code=0):
    """Run a program that sees neither the checkout nor the tests; return what it says."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=kept, timeout=600
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, tmp_path_factory):
    """The folder of the console scripts; dependencies come from the tests' own environment."""
    folder = tmp_path_factory.mktemp(request.param)
    source = folder / "source"  # a copy, so that the checkout gets no build folder
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("tokenflow_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    venv.create(folder / "venv", with_pip=True)
    pip = (folder / "venv" / "bin" / "python", "-m", "pip", "--disable-pip-version-check")
    if request.param == "wheel":
        run(*pip, "wheel", "--no-deps", "--wheel-dir", folder, source, cwd=folder)
        shutil.rmtree(source)
        run(*pip, "install", "--no-deps", *folder.glob("*.whl"), cwd=folder)
    else:
        run(*pip, "install", "--no-deps", "-e", source, cwd=folder)
    (site,) = (folder / "venv" / "lib").glob("python3*/site-packages")
    paths = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(paths))
    return folder / "venv" / "bin"


def test_it_is_the_installed_package(installed, tmp_path):
    code = "import tokenflow_jax, pathlib; print(pathlib.Path(tokenflow_jax.__file__).parent)"
    package = pathlib.Path(run(installed / "python", "-c", code, cwd=tmp_path).strip())
    assert installed.parents[1] in package.parents
    for name in ("py.typed", "assets/teacher.safetensors", "assets/emoji.array_record",
                 "assets/page/index.html", "assets/models/emoji/model.safetensors"):  # fmt: skip
        assert (package / name).is_file()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_script(installed, tmp_path, name):
    assert "--" in run(installed / f"tokenflow-{name}", "--help", cwd=tmp_path)


def test_configs_are_found_by_name(installed, tmp_path):
    train = installed / "tokenflow-train"
    assert "finetune_decoder" in run(train, "--config=tokenizer", "--help", cwd=tmp_path)
    for config in ("tokenizer:b", "configs/tokenizer.py:b"):
        wrong = (f"--config={config}", "--config.batch_size=0")
        assert "batch_size=0" in run(train, *wrong, cwd=tmp_path, code=2)
    text = run(train, "--config=tokeniser", cwd=tmp_path, code=2)
    assert "did you mean tokenizer?" in text and text.count("\n") == 1


@pytest.mark.parametrize("installed", ["wheel"], indirect=True)
def test_two_steps_of_training(installed, tmp_path):
    """From the wheel; every other test trains from a checkout."""
    shrink = ("--config.total_steps=2", "--config.batch_size=2", "--config.eval_every=0",
              "--config.image_every=0", "--config.eval.knn_label=")  # fmt: skip
    text = run(installed / "tokenflow-train", "--config=tokenizer", *shrink, cwd=tmp_path)
    assert "step 2/2" in text
    assert (tmp_path / "runs" / "tokenizer" / "report.html").is_file()
