"""Alarms: what sets them off, what does not, and that each sounds once."""

import numpy as np
import pytest

from tokenflow_jax.train.alarms import Alarms


def heard(curve, name="loss/total", total=100):
    alarms = Alarms(total)
    return [(i, text) for i, value in enumerate(curve) for text in alarms.of(i, {name: value})]


def test_a_loss_that_jumps_is_told_once_until_it_is_back():
    usual = [1.0 + 0.01 * (i % 3) for i in range(20)]
    found = heard([*usual, 3.0, 3.1, 3.2, *usual[:3], 4.0])
    assert [step for step, _ in found] == [20, 26]
    assert "jumped to 3 from 1.01" in found[0][1] and "learning_rate" in found[0][1]


def test_a_loss_that_stays_higher_is_the_usual_one_at_last():
    """As after the start of an adversarial loss: a later jump is told, too."""
    found = heard([*[1.0] * 20, *[3.0] * 20, 9.0])
    assert [step for step, _ in found] == [20, 40] and "to 9 from 3" in found[1][1]


def test_held_out_figures_do_not_end_an_alarm():
    alarms = Alarms(100)
    lines = [{"step": i, "loss/total": 1.0} for i in range(10)]
    lines += [{"step": 10, "loss/total": 9.0}, {"step": 10, "eval/psnr": 20.0}]
    lines += [{"step": 11, "loss/total": 9.0}]
    assert len([text for line in lines for text in alarms.of(line["step"], line)]) == 1


@pytest.mark.parametrize("form", ["noise", "decay", "rise", "negative", "start"])
def test_usual_losses_set_nothing_off(form):
    step = np.arange(200)
    noise = np.random.default_rng(0).normal(size=200)
    curves = {
        "noise": 1 + 0.2 * noise,
        "decay": 10 * np.exp(-step / 30) + 0.05 * noise,
        "rise": 1 + 0.005 * step + 0.02 * noise,
        "negative": -1 + 0.1 * noise,
        "start": np.concatenate([[12.0, 9.0, 30.0], 2 + 0.1 * noise]),
    }
    assert not heard(curves[form], total=200)


def test_codes_that_fall_out_of_use_are_told():
    found = heard([0.2, 0.9, 0.95, 0.5, 0.4, 0.3, 0.9, 0.2], "usage/all")
    assert [step for step, _ in found] == [4, 7]
    assert "fell from 95.0% to 40.0%" in found[0][1] and "revive_every" in found[0][1]


def test_codes_that_never_come_into_use_are_told():
    found = heard([0.01] * 30, "usage/all")
    assert [step for step, _ in found] == [10] and "is 1.0% after a tenth" in found[0][1]
    assert not heard([0.01] * 5 + [0.3] * 30, "usage/all")
    assert "(usage/pixel_all)" in heard([0.01] * 30, "usage/pixel_all")[0][1]
    assert not heard([0.01] * 30, "usage/scale_1")  # one code a picture
