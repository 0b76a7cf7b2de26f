"""The terminal shows no noise of TensorStore."""

import types

from tokenflow_jax import log as runlog


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
