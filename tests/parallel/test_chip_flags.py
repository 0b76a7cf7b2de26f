"""Flags of a chip's compiler: the files of launch/, switched off, overruled and missing."""

import pytest

from tokenflow_jax.parallel import chip_flags
from tokenflow_jax.parallel.chips import CHIPS


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    for name in ("TOKENFLOW_FLAGS", "LIBTPU_INIT_ARGS", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "v5p").write_text("# why\n--a_b=false\n\n--c=2\n")
    monkeypatch.setattr(chip_flags, "FOLDER", tmp_path)
    return tmp_path


def test_flags_become_options_of_the_compiler(monkeypatch):
    assert chip_flags.compiler_options(CHIPS["v5p"]) == {"a_b": "false", "c": "2"}
    assert chip_flags.compiler_options(CHIPS["v5e"]) == {}
    assert chip_flags.compiler_options(CHIPS["h100"]) == {}
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--c=3 --d=4")
    assert chip_flags.compiler_options(CHIPS["v5p"]) == {"a_b": "false"}
    monkeypatch.setenv("TOKENFLOW_FLAGS", "off")
    assert chip_flags.compiler_options(CHIPS["v5p"]) == {}


def test_a_report_says_which_flags_were_used(monkeypatch, folder):
    options = chip_flags.compiler_options(CHIPS["v5p"])
    assert chip_flags.describe(options) == "compiler flags: a_b=false, c=2"
    assert chip_flags.describe({}) == "compiler flags: none"
    monkeypatch.setattr(chip_flags, "FOLDER", folder / "missing")
    options = chip_flags.compiler_options(CHIPS["v5p"])
    assert options is None and "not installed" in chip_flags.describe(options)
