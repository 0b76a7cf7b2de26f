"""Imports go one way, from commands down to the base; and no torch, anywhere."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tokenflow_jax"

# A layer may import itself and what is listed here. ARCHITECTURE.md says why.
BASE = {"files", "log", "messages", "remote", "shipped", "stores", "hub"}
PROGRAMS = {*BASE, "parallel", "nets", "train", "weights", "evals", "data", "tokenizer"}
MAY_IMPORT = {
    "messages": set(),
    "shipped": set(),
    "files": {"messages", "remote"},
    "remote": {"hub", "log", "stores"},
    "stores": {"messages"},
    "hub": {"log", "messages"},
    "log": {"messages"},
    "data": BASE,
    "parallel": BASE,
    "nets": {*BASE, "parallel"},
    "train": {*BASE, "parallel"},
    "weights": {*BASE, "parallel", "nets", "train"},
    "evals": {*BASE, "parallel", "nets", "train", "weights", "data"},
    "tokenizer": PROGRAMS,
    "generation": PROGRAMS,
    "understanding": PROGRAMS,
    "unified": {*PROGRAMS, "generation", "understanding"},
    "export": PROGRAMS,
    "stages": {*PROGRAMS, "generation", "understanding", "unified"},
    "demo": {*PROGRAMS, "generation", "understanding", "unified"},
    "cli": {*BASE, "parallel", "compile_cache", "config_flag"},
    "compile_cache": {"log", "remote"},
    "config_flag": {"train"},
    "__init__": set(),
}
# Everything that `python -m` starts stands above all layers, wherever its file is.
COMMANDS = {
    "answer.py", "convert.py", "encode.py", "main.py", "preflight.py", "sample.py",
    "demo/__main__.py", "export/__main__.py",
    "data/measure.py", "data/prepare.py", "data/validate.py",
    "evals/fid.py", "evals/reconstruction.py", "evals/understanding.py",
    "evals/lmms_model.py", "evals/lmms_plugin.py",
}  # fmt: skip
# Third-party roots that a layer may import; a layer without an entry may import anything but
# what is forbidden everywhere.
MAY_USE = {
    "nets": {"jax", "flax", "numpy"},
    "data": {
        "numpy",
        "grain",
        "PIL",
        "absl",
        "array_record",
        "pyarrow",
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
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []  # these names are for type checkers alone
    for node in ast.walk(tree):
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


def modules_of(name):
    """The package's layer that an absolute name lies in, or None."""
    root, *rest = name.split(".")
    if root != "tokenflow_jax" or not rest:
        return None
    # Names of the package's own __init__ (a version) are no modules.
    exists = any((PACKAGE / p).exists() for p in (rest[0], f"{rest[0]}.py"))
    return rest[0] if exists else None


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_import_direction(path):
    part = part_of(path)
    command = path.relative_to(PACKAGE).as_posix() in COMMANDS
    assert command or part in MAY_IMPORT, f"{path.name} belongs to no layer: name it here"
    wrong = []
    for name in imports_of(path):
        root, layer = name.split(".")[0], modules_of(name)
        if layer is not None:
            if not command and layer not in MAY_IMPORT[part] | {part}:
                wrong.append(name)
        elif root == "tokenflow_jax":
            continue
        elif root in FORBIDDEN or (
            not command and root not in MAY_USE.get(part, {root}) | sys.stdlib_module_names
        ):
            wrong.append(name)
    assert not wrong, f"{path.relative_to(PACKAGE)} ({part}) must not import {wrong}"


def test_no_import_circles():
    """Not even inside functions, where an import circle hides."""
    graph = {}
    for path in files():
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        graph[module.removesuffix(".__init__")] = set(imports_of(path))
    modules = set(graph)
    # `from a.b import c` names the module a.b.c or the name c of the module a.b.
    edges = {
        module: {
            name if name in modules else name.rpartition(".")[0]
            for name in names
            if name in modules or name.rpartition(".")[0] in modules
        }
        - {module, "tokenflow_jax"}
        for module, names in graph.items()
    }
    done, open_ = set(), []

    def visit(module):
        assert module not in open_, " -> ".join([*open_[open_.index(module) :], module])
        if module in done:
            return
        open_.append(module)
        for other in sorted(edges[module]):
            visit(other)
        done.add(open_.pop())

    for module in sorted(edges):
        visit(module)


def test_the_check_sees_all_kinds_of_import(tmp_path, monkeypatch):
    """Guards the test above: each of these lines would be noticed."""
    package = tmp_path / "tokenflow_jax"
    (package / "models").mkdir(parents=True)
    path = package / "models" / "bad.py"
    path.write_text(
        "import torch\nfrom tokenflow_jax.parallel import mesh\nfrom ..train import loop\n"
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
