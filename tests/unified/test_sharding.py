"""The same run on one device, on eight, and in two processes."""

import json

import numpy as np
import pytest
import tiny
from processes import finish, start


@pytest.mark.slow
def test_losses_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZER", str(tiny.write_tokenizer(tmp_path / "tokenizer")))
    runs = {
        "one": {"JAX_NUM_CPU_DEVICES": "1", "sizes": "1,1,1,1"},
        "eight": {"sizes": "1,2,2,2"},
        "two": {"sizes": "1,2,2,2", "processes": 2},
    }
    found = {}
    for name, options in runs.items():
        workdir = tmp_path / name
        finish(start("process_program.py", "unified", workdir, 0, options.pop("sizes"), **options))
        history = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
        keys = ("loss/text", "loss/codes", "eval/loss", "eval/loss_draw", "eval/loss_answer")
        found[name] = [[point[key] for key in keys if key in point] for point in history]
    assert len(found["one"]) == 13 and found["one"][11][0] < found["one"][0][0]
    for name in ("eight", "two"):
        for one, other in zip(found["one"], found[name], strict=True):
            np.testing.assert_allclose(other, one, rtol=2e-4, err_msg=name)
