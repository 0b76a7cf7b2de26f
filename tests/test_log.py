"""The terminal shows no noise of TensorStore."""

import itertools
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


def test_progress_has_rate_and_eta_without_what_compiles(monkeypatch, caplog):
    now = 0.0
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now)

    def work():
        nonlocal now
        for i in range(20):
            if i % 4 == 0:
                now += 8 if i else 200  # a batch is made; the first compiles
            yield i

    items = work()
    line = runlog.Progress("draw", 20, "pictures")
    parts = [line.over(itertools.islice(items, n), batch=4) for n in (12, 8)]
    assert [*parts[0], *parts[1]] == list(range(20))
    assert caplog.messages == [
        "draw: 8 of 20, 0.5 pictures/s, eta 24s",
        "draw: 12 of 20, 0.5 pictures/s, eta 16s",
        "draw: 16 of 20, 0.5 pictures/s, eta 8s",
    ]
