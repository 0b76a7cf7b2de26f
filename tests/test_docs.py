"""The documentation: links, files, names, config keys and flags exist; pages stay short."""

import ast
import re
import runpy
from pathlib import Path

import ml_collections
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tokenflow_jax"
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "tools/*/*.md", "tests/golden/*.md")
    for path in ROOT.glob(pattern)
)
pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def code_of(page):
    """Return the code spans and indented or fenced lines of a page, continued lines joined."""
    text = page.read_text()
    spans = re.findall(r"`([^`\n]+)`", text)
    lines = re.findall(r"^    (.*)$", text.replace(" \\\n", " "), re.M)
    return spans + lines


@pages
def test_pages_are_short(page):
    lines, most = len(page.read_text().splitlines()), 110 if page == ROOT / "README.md" else 125
    assert lines <= most, f"{page.name} has {lines} lines: shorten others to add one"


@pages
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link.split("#")[0]).exists(), link


@pages
def test_named_files_and_functions_exist(page):
    for span in code_of(page):
        found = re.fullmatch(r"([\w./-]+\.(?:py|sh|md))(?:: ([\w.]+))?", span)
        if not found or page.name == "CHANGELOG.md":
            continue
        path, name = found.groups()
        places = [page.parent / path, ROOT / path, PACKAGE / path, *PACKAGE.rglob(path)]
        files = [place for place in places if place.is_file()]
        assert files, span
        if name:
            text = files[0].read_text()
            for part in name.split("."):
                assert re.search(rf"^\s*(def|class) {part}\b|^{part}\b.*=", text, re.M), span


def keys_of(config, prefix=""):
    for key in config:
        yield prefix + key
        if isinstance(config[key], ml_collections.ConfigDict):
            yield from keys_of(config[key], f"{prefix}{key}.")


@pytest.fixture(scope="module")
def config_keys():
    configs = [runpy.run_path(str(path))["get_config"]() for path in ROOT.glob("configs/*.py")]
    assert len(configs) >= 3
    return {key for config in configs for key in keys_of(config)}


@pages
def test_config_keys_exist(page, config_keys):
    for key in re.findall(r"--config\.([a-z_.]+)=", page.read_text()):
        assert key.rstrip(".") in config_keys, key
    sections = {key.split(".")[0] for key in config_keys if "." in key} - {"tokenizer"}
    for span in re.findall(r"`([a-z_]+\.[a-z_.]+)`", page.read_text()):
        is_key = span.split(".")[0] in sections and not re.search(r"\.(py|safetensors)$", span)
        if is_key and page.name != "CHANGELOG.md":
            assert span in config_keys or (PACKAGE / f"{span.replace('.', '/')}.py").exists(), span


def sources_of(module, depth=2):
    """Yield the text of a module and of the package's modules that it imports, to a depth."""
    yield module.read_text()
    for node in ast.walk(ast.parse(module.read_text())) if depth else ():
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tokenflow_jax"):
            folder = ROOT / node.module.replace(".", "/")
            for path in (folder, *(folder / alias.name for alias in node.names)):
                if path.with_suffix(".py").is_file():
                    yield from sources_of(path.with_suffix(".py"), depth - 1)


@pages
def test_commands_have_these_flags(page):
    for line in code_of(page):
        command = re.search(r"python -m ((?:tokenflow_jax|benchmarks|tools)[\w.]*)(.*)", line)
        if not command:
            continue
        path = ROOT / command[1].replace(".", "/")
        module = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        assert module.is_file(), line
        text = "".join(sources_of(module))
        for flag in re.findall(r"(?<=\s)--([a-z_]+)(?=[=\s]|$)", command[2]):
            assert re.search(rf"[\"'](--)?{flag}[\"']", text), f"--{flag} of {command[1]}"
