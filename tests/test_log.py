"""The terminal shows no noise of TensorStore."""

import subprocess
import sys
import types

from tokenflow_jax import log as runlog
from tokenflow_jax.messages import printable


def unraisable(error):
    return types.SimpleNamespace(
        exc_type=type(error), exc_value=error, exc_traceback=None, err_msg=None, object=None
    )


def test_only_tensorstore_is_hushed(monkeypatch):
    seen = []
    monkeypatch.setattr(runlog.sys, "unraisablehook", seen.append)
    runlog.hush_tensorstore()
    runlog.hush_tensorstore()  # once is enough
    other = unraisable(RuntimeError("another"))
    runlog.sys.unraisablehook(unraisable(RuntimeError("Event loop is closed")))
    runlog.sys.unraisablehook(other)
    assert seen == [other]


def test_no_control_character_of_a_file_reaches_the_terminal(capsys):
    runlog.set_up()
    runlog.log.warning("skipped %s", "a\x1b]0;title\x07.png")
    assert capsys.readouterr().err.endswith("WARNING skipped a\\x1b]0;title\\x07.png\n")


def test_no_control_character_of_a_tokenizer_folder_reaches_the_terminal(tmp_path):
    """Transformers has a log handler of its own, which prints what config.json says."""
    (tmp_path / "config.json").write_text('{"model_type": "\\u001b[31mEvil\\u0007"}')
    (tmp_path / "chat.jsonl").write_text("{}\n")
    command = [sys.executable, "-m", "tokenflow_jax.data.validate", str(tmp_path / "chat.jsonl")]
    command += [f"--text_tokenizer={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and str(tmp_path) in done.stderr
    assert printable(done.stderr + done.stdout) == done.stderr + done.stdout
