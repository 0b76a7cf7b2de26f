"""Imports go one way: models <- evals, convert <- train <- main; and no torch, anywhere."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tokenflow_jax"
EDGE = (
    "mesh", "checkpoint", "checksums", "disk", "distributed", "optim", "metrics", "report",
    "runlog", "command_line",
)  # fmt: skip

# Module (or package) -> the parts of tokenflow_jax that it may import. `api` is the public door.
MAY_IMPORT = {
    "models": {"models"},
    "data": {"data"},
    **{name: set(EDGE) for name in EDGE},
    "convert": {"convert", "models", *EDGE},
    "api": {"models", "convert", "checkpoint", "data"},
    "assistant": {"api", "models", "data", "convert", *EDGE},
    "evals": {"evals", "api", "assistant", "models", "data", "convert", *EDGE},
    "encoding": {"models", "data", "evals", "api", *EDGE},
    "generator": {"models", "convert", "data", "evals", "api", *EDGE},
    "train": {"train", "models", "data", "convert", "evals", "api", "encoding", "generator", *EDGE},
    "main": {"train", *EDGE},
    "chips": set(),
    "costs": set(),
    "preflight": {"train", "chips", "costs", *EDGE},
    "__init__": {"api", "assistant", "generator"},
}
# Third-party roots that a part may import; a part that is not named here may import anything
# but what is forbidden everywhere.
MAY_USE = {
    "models": {"jax", "flax", "numpy"},
    "data": {
        "numpy",
        "grain",
        "PIL",
        "absl",
        "array_record",
        "tensorflow_datasets",
        "etils",
        "transformers",
    },
}
FORBIDDEN = {"torch", "torchvision", "tensorflow"}


def files():
    return sorted(PACKAGE.rglob("*.py"))


def imports_of(path):
    """Absolute dotted names that a file imports anywhere, inside functions included."""
    parents = path.relative_to(PACKAGE.parent).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*parents[: -node.level], *([node.module] if node.module else [])])
            # `from tokenflow_jax import mesh` imports the module mesh.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def part_of(path):
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_import_direction(path):
    part = part_of(path)
    # A new program at the top (sample, encode, ...) stands where main stands.
    allowed = MAY_IMPORT.get(part, set(MAY_IMPORT) - {"main"})
    wrong = []
    for name in imports_of(path):
        root, *rest = name.split(".")
        if root == "tokenflow_jax":
            # Names of the package's own __init__ (a version) are no modules.
            is_part = rest and any((PACKAGE / p).exists() for p in (rest[0], f"{rest[0]}.py"))
            if is_part and rest[0] not in allowed:
                wrong.append(name)
        elif root in FORBIDDEN or root not in MAY_USE.get(part, {root}) | sys.stdlib_module_names:
            wrong.append(name)
    assert not wrong, f"{path.relative_to(PACKAGE)} ({part}) must not import {wrong}"


def test_the_check_sees_all_kinds_of_import(tmp_path, monkeypatch):
    """Guards the test above: each of these lines would be noticed."""
    package = tmp_path / "tokenflow_jax"
    (package / "models").mkdir(parents=True)
    path = package / "models" / "bad.py"
    path.write_text(
        "import torch\nfrom tokenflow_jax import mesh\nfrom ..train import loop\n"
        "def f():\n    import tokenflow_jax.train.metrics as m\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", package)
    assert set(imports_of(path)) == {
        "torch", "tokenflow_jax.parallel.mesh", "tokenflow_jax.train.loop",
        "tokenflow_jax.train.metrics",
    }  # fmt: skip


def test_light_imports_stay_light():
    """`main` answers a wrong flag at once; data workers do not start JAX."""
    code = (
        "import sys\n"
        "import tokenflow_jax.main\n"
        "heavy = {'jax', 'flax', 'orbax', 'tensorflow_datasets', 'transformers', 'tensorflow'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True
    )
    assert result.stdout.strip() == "[]"
