"""Model cards say what is known, and nothing else."""

import json

import pytest

from tokenflow_jax.weights import card
from tokenflow_jax.weights.card import Trained, write_card

RUN = {
    "total_steps": 8, "batch_size": 4, "seed": 0, "config_file": "/home/me/mine.py:b",
    "data": {"name": "emoji", "path": "/home/me/data", "split": "train", "eval_split": "heldout"},
    "init_from": "/home/me/base", "optimizer": {"name": "adam", "learning_rate": 0.0015},
}  # fmt: skip


@pytest.fixture
def workdir(tmp_path):
    for step in (2, 4):
        for item in ("state", "info"):
            (tmp_path / "checkpoints" / str(step) / item).mkdir(parents=True)
    lines = [
        {"step": 2, "eval/psnr": 20.0},
        {"step": 3, "loss/total": 1.0},
        {"step": 3, "eval/psnr": 21.23456, "eval/ssim": None},
        {"step": 4, "eval/psnr": 22.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (tmp_path / "images").mkdir()
    for name in ("scales_0000002", "scales_0000004", "other"):
        (tmp_path / "images" / f"{name}.png").write_bytes(name.encode())
    return tmp_path


def test_facts_are_those_of_the_checkpoint(workdir):
    """The figures and grids are the last up to its step; paths of this machine stay out."""
    facts = Trained(str(workdir), 4, "ema", RUN).facts()
    assert facts["held_out"] == {"step": 4, "split": "heldout", "figures": {"psnr": 22.0}}
    at = Trained(str(workdir / "checkpoints" / "4"), 4, "ema", RUN)
    assert at.facts() == facts and at.pictures()["scales"].name == "scales_0000004.png"
    averaged = {**RUN, "ema_decay": 0.99}  # these figures are of the moving average
    assert "held_out" in Trained(str(workdir), 4, "ema", averaged).facts()
    assert "held_out" not in Trained(str(workdir), 4, "raw", averaged).facts()
    (workdir / "checkpoints" / "2" / "state").rmdir()  # the run goes on and removes old ones
    early = Trained(str(workdir), 2, "raw", RUN)
    assert early.facts()["held_out"]["figures"] == {"psnr": 20.0}
    assert [path.name for path in early.pictures().values()] == ["scales_0000002.png"]
    assert (facts["config"], facts["started_from"]) == ("mine.py:b", "base")
    assert (facts["steps"], facts["weights"]) == ("4 of 8", "moving average")
    assert "/home" not in json.dumps(facts)
    text = write_card("tokenizer", "mine", {"codes": 5}, facts, ["images/scales.png"])
    for line in ("| psnr | 22 |", "| config | mine.py:b |", "Split heldout, step 4.",
                 "![images/scales.png](images/scales.png)", 'from_pretrained("mine")'):  # fmt: skip
        assert line in text
    assert text.startswith("---\nlibrary_name: tokenflow_jax\n")


def test_what_is_unknown_is_left_out(tmp_path):
    assert card.UNKNOWN.facts() == {} and card.UNKNOWN.pictures() == {}
    converted = Trained(str(tmp_path), 0, "raw", {"stage": "tokenizer", "model": {}})
    assert converted.facts() == {} and converted.pictures() == {}
    text = write_card("tokenizer", "mine", {"codes": 5}, {}, [])
    assert "## Model" in text
    assert "Training" not in text and "figures" not in text and "None" not in text


def test_a_card_of_a_file_is_made_of_what_the_file_says(workdir):
    facts = Trained(str(workdir), 4, "ema", RUN).facts()
    saved = {"stage": "tokenizer", "training": json.loads(json.dumps(facts))}
    assert Trained("mine", None, "raw", saved).facts() == facts
    hostile = {"training": {"data": "a|b\n# x <script> \x1b[2J", "held_out": {"figures": 3}}}
    text = write_card("tokenizer", "mine", {}, Trained("x", None, "", hostile).facts(), [])
    assert "\n# x" not in text and "<script" not in text.replace("\\<", "") and "\x1b" not in text
