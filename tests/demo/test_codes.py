"""A picture's codes as the page shows them, and which models a page gets."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import tiny
from PIL import Image
from unified.test_stage import make
from unified.test_stage import tiny as tiny_unified

import tokenflow_jax as tfx
from tokenflow_jax.demo import codes, models
from tokenflow_jax.tokenizer.pyramid import Scales
from tokenflow_jax.train import loop

SCALES = Scales((1, 2, 4))


def test_equal_codes_have_equal_colors_and_every_cell_is_found_again():
    codes_L = np.arange(SCALES.tokens)
    codes_L[-1] = codes_L[-2]
    drawn = np.asarray(codes.code_map(codes_L, SCALES, 2))
    assert drawn.shape == (codes.SIDE, codes.SIDE, 3)
    cell = codes.SIDE // 4
    colors = [tuple(drawn[row * cell + 5, column * cell + 5]) for row in range(4)
              for column in range(4)]  # fmt: skip
    assert len(set(colors)) == 15 and colors[-1] == colors[-2]
    places = [codes.cell_at(SCALES, 2, x * cell + 5, y * cell + 5) for y in range(4)
              for x in range(4)]  # fmt: skip
    assert places == list(range(5, 21))
    assert codes.cell_at(SCALES, 1, codes.SIDE, codes.SIDE + 9) == 4  # the last one, at the border
    assert codes.cell_at(SCALES, 0, -3, 10) == 0


def test_a_change_is_black_where_nothing_changed():
    before = Image.new("RGB", (4, 4), (10, 10, 10))
    after = before.copy()
    after.putpixel((1, 2), (12, 10, 0))
    found = np.asarray(codes.change(before, after))
    assert tuple(found[2, 1]) == (20, 0, 100)
    assert found.sum() == 120


def test_the_nearest_codes_are_those_of_the_largest_cosine():
    tokenizer = tfx.Tokenizer(tiny.TINY, tiny.random_params(tiny.TINY, 0))
    found = codes.nearest_codes(tokenizer, 3)
    table = np.asarray(tokenizer.params["pixel_codebook"])
    table = table / np.linalg.norm(table, axis=1, keepdims=True)
    cosines = table @ table[3]
    assert 3 not in found["pixel"] and len(found["pixel"]) == 5
    assert found["pixel"] == sorted(found["pixel"], key=lambda code: -cosines[code])
    assert cosines[found["pixel"][0]] == np.sort(cosines)[-2]


def test_a_picture_is_its_own_nearest_neighbor(monkeypatch):
    monkeypatch.setattr(codes, "_EMOJI", 12)
    tokenizer = tfx.Tokenizer(tiny.TINY, tiny.random_params(tiny.TINY, 0))
    neighbors = codes.Neighbors(tokenizer)
    pictures, _ = neighbors._known
    [(near, caption), _] = neighbors.of(np.asarray(tokenizer.encode(pictures[4]["image"]))[0], 2)
    assert caption == pictures[4]["caption"]
    np.testing.assert_array_equal(near, codes.enlarged(pictures[4]["image"]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    tokenizer = tiny.write_tokenizer(folder / "tokenizer")
    config = tiny_unified(str(tokenizer))
    config.eval.update(max_new=0, retrieval=0, prompts=())
    loop.train_and_evaluate(config, folder / "unified", make(config))
    return folder


def test_checkpoints_say_what_a_page_can_do(runs):
    alone = models.load([str(runs / "tokenizer")])
    assert alone.generator is None and alone.assistant is None and not alone.draws_in_chat
    both = models.load([str(runs / "tokenizer"), str(runs / "unified")])
    assert both.draws_in_chat and both.generator and both.assistant
    with pytest.raises(ValueError, match="unified: another checkpoint is the generator already"):
        models.load([str(runs / "unified"), str(runs / "unified")])
    with pytest.raises(ValueError, match="no checkpoint"):
        models.load([])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--chekpoint=emoji"], "checkpoint"),
        (["--checkpoint=/nowhere"], "/nowhere"),
        (["--checkpoint=x", "--port=many"], "--port"),
    ],
)
def test_the_command_says_what_is_missing(arguments, said):
    command = [sys.executable, "-m", "tokenflow_jax.demo", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    gradio = importlib.util.find_spec("gradio")
    said = said if gradio or "nowhere" not in said else "pip install 'tokenflow_jax[demo]'"
    assert said in done.stderr.splitlines()[-1]
