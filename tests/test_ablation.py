"""The ablations: the rule that decides on claims, and a small run of the matrix."""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from config_files import generation, tokenizer, understanding

from benchmarks import matrix
from benchmarks.ablation import __main__ as ablation
from benchmarks.ablation import claims, costs, page, suites
from benchmarks.ablation.claims import Claim
from benchmarks.matrix import Run
from tokenflow_jax.tokenizer.model import TokenizerConfig
from tokenflow_jax.tokenizer.state import CodebookConfig

BETTER = Claim("a is larger", "us", "a", "b", "figure")


def rows(a, b):
    return {name: [{"figure": x} for x in values] for name, values in (("a", a), ("b", b))}


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ((3.0, 3.1, 2.9), (1.0, 1.1, 0.9), "held here"),
        ((1.0, 1.1, 0.9), (3.0, 3.1, 2.9), "did not hold here"),
        ((1.0, 1.2, 1.4), (1.0, 1.1, 1.3), "cannot tell at this size"),
        ((3.0,), (1.0, 1.1, 0.9), "cannot tell: too few runs"),
        ((1.0, 1.0), (2.0, 2.0), "cannot tell: no spread"),
    ],
)
def test_the_rule(a, b, words):
    assert claims.decide(BETTER, rows(a, b)).words == words


def test_smaller_may_be_better_and_the_interval_is_welch_s():
    smaller = Claim("a is smaller", "us", "a", "b", "figure", -1)
    found = claims.decide(smaller, rows((1.0, 1.1, 0.9), (3.0, 3.2, 2.8)))
    assert found.words == "held here" and found.difference == pytest.approx(2.0)
    # By hand: variances 0.01 and 0.04 of 3 each, 2.94 degrees of freedom, quantile 3.22.
    assert found.half_width == pytest.approx(3.22 * math.sqrt(0.05 / 3), rel=0.01)


def test_figures_that_a_row_lacks_decide_nothing():
    found = claims.decide(BETTER, {"a": [{"figure": 1.0}], "b": [{"other": 1.0}] * 3})
    assert found.words == "cannot tell: too few runs"


def test_the_page_has_tables_and_verdicts(tmp_path):
    """From the raw results alone; rows without a figure leave their cell empty."""
    for row, values in {"joined": (9.0, 9.1, 9.2), "shared": (4.0, 4.1, 4.2)}.items():
        for seed, rfid in enumerate(values):
            (run := tmp_path / "paper" / f"{row}_{seed}").mkdir(parents=True)
            (run / "metrics.jsonl").write_text('{"step": 1, "eval/psnr": 20}\n' * 2)
            figures = {"rfid": rfid, "psnr": 20 + rfid, "bits": 704.0}
            page.keep(tmp_path, "paper", row, seed, "2h", figures)
    html, markdown = page.write(tmp_path)
    text = markdown.read_text()
    assert text.index("| joined |") < text.index("| shared |")
    assert "| joined | 3 | 704 ± 0 | 9.1 ± 0.1 | 29.10 ± 0.10 |" in text
    assert "joined features (TokenFlow, table 5): held here. rfid of shared against joined" in text
    assert text.count("cannot tell: too few runs") == len(claims.CLAIMS["paper"]) - 1
    assert "<table>" in html.read_text() and "4.1 ± 0.1" in html.read_text()
    # What is published has no runs: the same page comes from the gathered results.
    (published := tmp_path / "published").mkdir()
    (published / "results.jsonl").write_text((tmp_path / "results.jsonl").read_text())
    again = page.write(published)
    assert [path.read_text() for path in again] == [html.read_text(), text]


def test_figures_of_several_indices_and_scales_are_told():
    run = {"codes_used/a": 0.2, "codes_used/b": 0.4, "codes_used/a/scale_8": 0.1}
    run |= {"codes_used/b/scale_8": 0.3, "perplexity/scale_8": 7.0, "psnr": 20.0}
    assert page._value(run, "codes_used") == pytest.approx(0.3)
    assert page._value(run, "codes_used/scale_8") == pytest.approx(0.2)
    [(head, cells)] = page._scale_tables({"row": [run, run]})
    assert head[1:] == ["8 x 8"] and cells == [["row", "20.0 ± 0.0 %; 7 ± 0"]]


def test_pictures_of_the_first_seed_stand_below_their_originals(tmp_path):
    for row, value in (("joined", 0), ("shared", 100)):
        (tmp_path / f"{row}_0" / "checkpoints").mkdir(parents=True)
        kept = np.full((2, 3, 16, 16, 3), value, np.uint8)
        np.save(tmp_path / f"{row}_0" / "reconstructed.npy", kept)
    found = page._pictures(tmp_path, ["joined", "shared", "separate"])
    assert found.shape[0] == 3 * (128 + 2) + 2 and found.shape[1] > 3 * 130
    assert [found[2 + i * 130 + 60, -60, 0] for i in range(3)] == [100, 0, 100]
    assert page._pictures(tmp_path, ["separate"]) is None


@pytest.mark.slow
def test_a_row_is_trained_judged_and_pictured(tmp_path):
    tiny = {"total_steps": 1, "batch_size": 2, "eval_every": 0, "image_every": 0,
            "eval.knn_label": "", "losses.perceptual_weight": 0.0}  # fmt: skip
    workdir = Run("joined", "configs/tokenizer.py", tiny).train(0, tmp_path)
    assert matrix.figures(workdir)["step"] == 1
    options = argparse.Namespace(inception="", cifar10="")
    judged = ablation._reconstruction(workdir, tmp_path, options)
    assert judged["images"] == 158 and 0 < judged["codes_used/scale_8"] <= 1
    found = page._pictures(tmp_path, ["joined"])
    assert found.shape[0] == 2 * 130 + 2
    originals, made = np.load(workdir / "reconstructed.npy")
    assert originals.shape == made.shape == (8, 64, 64, 3) and (originals != made).any()


@pytest.mark.slow
def test_the_costs_of_steps_are_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(costs, "_ROUNDS", 3)
    monkeypatch.setattr(costs, "_STEPS", 1)
    tiny = {"batch_size": 2, "model.codebook_size": 64, "eval.knn_label": ""}
    runs = [Run("joined", "configs/tokenizer.py", tiny)]
    runs.append(Run("shared", "configs/tokenizer.py", {**tiny, "batch_size": 4}))
    found = costs.measure(runs)
    assert min(one["step_ms"] for one in found.values()) > 0
    small, large = (found[run.name]["memory_gb"] for run in runs)
    assert 0.01 < small < large < 2
    (tmp_path / "paper_costs.json").write_text(json.dumps(found))
    head, cells = page._table(
        "paper", {name: [{"rfid": 1.0}] for name in [*found, "separate"]}, tmp_path
    )
    assert head[-2:] == ["ms per step", "its memory, GB"] and cells[0][-1] == f"{small:.3f}"
    assert cells[2][-2:] == ["", ""]  # not measured


def test_a_finished_matrix_trains_nothing(tmp_path):
    """Its page is written again; another budget would be another folder."""
    (tmp_path / "10m").mkdir()
    for row in suites.RECIPES:
        page.keep(tmp_path / "10m", "sampling", row, 0, "10m", {"top10": 0})
    command = [sys.executable, "-m", "benchmarks.ablation", "--suite=sampling", "--budget=10m"]
    done = subprocess.run(
        [*command, "--seeds=1", f"--out={tmp_path}"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "drawer" not in done.stdout and "ablation.md" in done.stdout
    assert [one.name for one in (tmp_path / "10m" / "sampling").iterdir()] == ["drawer_0.lock"]


def test_a_run_of_another_process_is_left_to_it(tmp_path):
    with matrix.claimed(tmp_path / "lock") as first, matrix.claimed(tmp_path / "lock") as second:
        assert first and not second
    with matrix.claimed(tmp_path / "lock") as again:
        assert again


@pytest.mark.parametrize("suite", suites.SUITES)
def test_claims_name_rows_of_their_suite(suite):
    options = {"data": {}, "tokenizer": "t"}
    names = {run.name for run in suites.rows(suite, "2h", **options)}
    names |= set(suites.RECIPES) if suite == "sampling" else set()
    for claim in claims.CLAIMS[suite]:
        assert {claim.better, claim.worse} <= names
    large = suites.rows(suite, "2h", accelerator=True, **options)
    assert (
        large[0].settings["total_steps"]
        > suites.rows(suite, "2h", **options)[0].settings["total_steps"]
    )


@pytest.mark.parametrize("suite", suites.SUITES)
def test_every_row_is_a_config(suite):
    """Its settings exist, and its models and quantizers can be made."""
    files = {"tokenizer": tokenizer, "generation": generation, "understanding": understanding}
    for run in suites.rows(suite, "2h", data={}, tokenizer="runs/quickstart"):
        name = Path(run.config).stem
        config = files[name].get_config()
        config.update_from_flattened_dict(dict(run.settings))
        if name == "tokenizer":
            model = TokenizerConfig(**config.model)
            model.quantizer.check_codebook(CodebookConfig(**config.codebook))
            assert suites.bits(run.settings) > 600


def test_a_trial_has_one_seed_and_decides_nothing():
    assert suites.BUDGETS["10m"] == 1 and suites.BUDGETS["2h"] == suites.BUDGETS["8h"] == 3


def test_two_indices_of_half_the_bits():
    rows = {run.name: run.settings for run in suites.rows("paper", "2h", data={}, tokenizer="")}
    assert suites.bits(rows["shared"]) == 704
    assert abs(suites.bits(rows["separate"]) / 704 - 1) < 0.01
    assert abs(suites.bits(rows["three_scales"]) / 704 - 1) < 0.08
