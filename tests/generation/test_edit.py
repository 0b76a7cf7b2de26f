"""Editing: kept and drawn codes, the rules of masks, and requests that cannot be met."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny as tiny_config
from golden import generation as golden

import tokenflow_jax as tfx
from tokenflow_jax.data.built_in_text import ByteTokenizer
from tokenflow_jax.data.text import PromptEncoder
from tokenflow_jax.generation import edit as editing
from tokenflow_jax.generation.api import Generator, Recipe
from tokenflow_jax.generation.model import Generation, GenerationConfig
from tokenflow_jax.generation.sample import Prefix, Sampler
from tokenflow_jax.nets.lm import LMConfig

CONFIG = GenerationConfig(
    lm=LMConfig(vocabulary_size=259 + 32, width=16, layers=1, heads=2, kv_heads=2, mlp_width=24),
    scales=(1, 2, 4),
    codebook_size=32,
    image_start=259,
    code_channels=9,
)
PICTURE = np.random.default_rng(3).integers(0, 256, (16, 16, 3), np.uint8)
LEFT = np.arange(16)[None].repeat(16, axis=0) < 8
ONCE = {"guidance": 2.0, "passes": ((8, 0.9),)}
SETTINGS = [
    (ONCE, {}),
    ({"guidance": 0.0, "passes": ((8, 0.9), (4, 0.5), (1, 0.0))}, {}),
    (ONCE, {"rope": "3d", "scale_inputs": "residual"}),
]


@pytest.fixture(scope="module")
def generator():
    """Random weights, large enough that prompts matter."""
    tokenizer = tfx.Tokenizer(tiny_config.TINY, tiny_config.random_params(tiny_config.TINY, 0))
    shapes = jax.eval_shape(Generation(CONFIG).init_params, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    recipe = Recipe(passes=((8, 0.9),), negative_prompt="a bad picture")
    return Generator(CONFIG, params, tokenizer, PromptEncoder(ByteTokenizer(), 16), recipe)


@pytest.mark.parametrize("changes, options", SETTINGS)
def test_nothing_inside_is_the_encoding_and_everything_is_drawing(generator, changes, options):
    generator = dataclasses.replace(generator, config=dataclasses.replace(CONFIG, **options))
    draw = functools.partial(generator.generate, ["dog", "cat"], seed=2, **changes)
    own = np.asarray(generator.tokenizer.encode(PICTURE))
    kept = draw(image=PICTURE, mask=np.zeros((16, 16), bool)).codes
    np.testing.assert_array_equal(kept, np.repeat(own, 2, axis=0))
    plain = draw().codes
    drawn = draw(image=PICTURE, mask=np.ones((16, 16), bool)).codes
    np.testing.assert_array_equal(drawn, plain)
    half = draw(image=PICTURE, mask=LEFT).codes
    np.testing.assert_array_equal(draw(image=PICTURE, mask=LEFT).codes, half)  # the same seed
    finest = half[:, 5:].reshape(2, 4, 4)
    assert (half[:, 5:] != own[:, 5:]).any() and (finest[0, :, :2] != finest[1, :, :2]).any()


def test_kept_codes_explain_what_all_coarser_codes_leave(generator):
    """The finest kept codes are the nearest to the map less drawn and kept coarser codes."""
    tokenizer = generator.tokenizer
    codes = generator.generate("dog", image=PICTURE, mask=LEFT, seed=1).codes
    chosen = np.asarray(tokenizer.features(codes[:, :5])).reshape(4, 4, 9)
    want = editing.request(tokenizer, PICTURE, LEFT).edit.map_1HWC[0] - chosen
    halves = [np.asarray(half) for half in tokenizer.codebooks]
    unit = [half / np.linalg.norm(half, axis=1, keepdims=True) for half in halves]
    z = [want[..., :6], want[..., 6:]]
    scores = sum(
        (np.asarray(part) / np.linalg.norm(part, axis=-1, keepdims=True)) @ half.T
        for part, half in zip(z, unit, strict=True)
    )
    np.testing.assert_array_equal(codes[0, 5:].reshape(4, 4)[:, 2:], scores.argmax(-1)[:, 2:])


def test_the_coarsest_scales_stay(generator):
    own = np.asarray(generator.tokenizer.encode(PICTURE))
    for options, kept in (({"keep": 2}, 5), ({"strength": 0.6}, 1), ({"strength": 0.0}, 21)):
        codes = generator.generate("dog", image=PICTURE, **options).codes
        np.testing.assert_array_equal(codes[:, :kept], own[:, :kept])
        assert kept == 21 or (codes[:, kept:] != own[:, kept:]).any()


def test_cells_are_drawn_from_half_inside_on():
    mask = np.zeros((16, 16), bool)
    mask[:, :5] = True  # one column of four cells, and a pixel of the next
    scales = tiny_config.TINY.pyramid
    edit = editing.make_edit(np.zeros((4, 4, 9)), mask, 0, scales, 1.0)
    drawn = np.asarray(edit.drawn_1N[0])
    assert drawn[0] and drawn[1:5].tolist() == [True, False] * 2
    assert drawn[5:].reshape(4, 4).tolist() == [[True, True, False, False]] * 4
    narrow = editing.make_edit(np.zeros((4, 4, 9)), mask & (np.arange(16) < 4), 0, scales, 1.0)
    assert not narrow.drawn_1N[0, 0]  # a quarter
    np.testing.assert_array_equal(narrow.outside_SHW[0], [[0, 1, 1, 1]] * 4)


def test_outpainting_shrinks_the_picture_into_a_square(generator):
    wide = np.full((32, 64, 3), 90, np.uint8)
    asked = editing.request(generator.tokenizer, wide, outpaint=(0.5, 0, 0.5, 0))
    where = np.zeros((16, 16), bool)
    where[6:10, 4:12] = True
    np.testing.assert_array_equal(asked.mask_HW, ~where)
    assert asked.image_HWC.shape == (16, 16, 3) and (asked.image_HWC == 90).all()
    # Also one that is large, whose square would be larger than pictures may be.
    large = np.full((1600, 3200, 3), 90, np.uint8)
    asked = editing.request(generator.tokenizer, large, outpaint=np.array([1, 0, 1, 0]))
    assert (asked.image_HWC == 90).all() and not asked.mask_HW.all()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"outpaint": (4,) * 4}, "nothing is left of it in 16 pixels"),
        ({"strength": 0}, "only reconstructed"),
        ({"mask": LEFT & ~LEFT}, "only reconstructed"),
        ({"strength": 1}, ""),
        ({"mask": LEFT}, ""),
    ],
)
def test_edits_that_keep_or_draw_nothing_are_told(generator, caplog, options, told):
    editing.request(generator.tokenizer, PICTURE, **options)
    assert (told in caplog.text) if told else not caplog.text


def test_a_recipe_records_the_edit(generator, tmp_path):
    from PIL import Image

    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    Image.fromarray(LEFT).resize((32, 32)).save(tmp_path / "m.png")
    drawn = generator.generate("dog", image=tmp_path / "a.png", mask=tmp_path / "m.png", keep=1)
    about = drawn.recipe["edit"]
    assert about["image"].endswith("a.png") and about["mask"].endswith("m.png")
    assert about["keep"] == 1
    same = generator.generate("dog", image=PICTURE, mask=LEFT, keep=1)
    np.testing.assert_array_equal(drawn.codes, same.codes)
    assert about["pixels"] == same.recipe["edit"]["pixels"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": "no/such.png", "keep": 1}, r"image 'no/such\.png.*No such file"),
        ({"image": PICTURE}, "give a mask, strength, keep or outpaint"),
        ({"image": PICTURE, "mask": LEFT[:4]}, "16 x 4 pixels has another aspect.*16 x 16"),
        ({"image": PICTURE, "strength": 1.5}, r"strength 1\.5 must be 0"),
        ({"image": PICTURE, "strength": "0.5"}, r"strength '0\.5' must be 0"),
        ({"image": PICTURE, "keep": 1.5}, r"keep 1\.5 must be 0 to 3"),
        ({"image": PICTURE, "outpaint": 0.5}, r"outpaint 0\.5: give the parts"),
        ({"image": PICTURE, "outpaint": "0101"}, "outpaint '0101': give the parts"),
        ({"image": PICTURE, "keep": 4}, "keep 4 must be 0 to 3, the number of scales"),
        ({"image": PICTURE, "keep": 1, "strength": 0.5}, "give one of them"),
        ({"image": PICTURE, "outpaint": (0, -1, 0, 0)}, r"outpaint \(0, -1, 0, 0\).*0\.5,0,0\.5,0"),
        ({"image": PICTURE, "outpaint": (0.01,) * 4}, "less than a pixel of 16 x 16"),
        ({"image": PICTURE, "mask": LEFT.astype(np.float32)}, "float32, at most 1.0: give bool"),
        ({"image": PICTURE, "mask": LEFT.astype(np.uint8)}, "uint8, at most 1: give bool"),
        ({"mask": LEFT}, "need an image"),
    ],
)
def test_requests_that_cannot_be_met(generator, options, message):
    with pytest.raises(ValueError, match=message):
        generator.generate("dog", **options)


def test_scales_follow_any_history_from_a_traced_start():
    """Rows that share a cache with entries they do not read, and room behind the codes."""
    case, data = golden.load("s4"), golden.stored("s4", "generate")
    ids = np.asarray(data["prefix_ids"], np.int32)
    sampler = Sampler(Generation(case.config), case.pad_id, ((1, 0.0),) * 3)
    params, keys = case.params["params"], jax.random.split(jax.random.key(0), len(ids) // 2)

    @jax.jit
    def draw(prefix):
        draws = sampler.scales(params, case.codebooks, prefix, keys, 7.5)
        return [draw.codes_BL for draw in draws if draw.index == (2 if draw.scale else 0)]

    half = len(ids) // 2
    prefix = jax.jit(sampler.begin)(params, ids[:half], ids[half:])
    assert isinstance(prefix, Prefix)
    more = ((0, 0), (0, 0), (0, 7), (0, 0), (0, 0))
    cache = dataclasses.replace(
        prefix.cache,
        keys=np.pad(prefix.cache.keys, more, constant_values=9),
        values=np.pad(prefix.cache.values, more, constant_values=9),
    )
    real = np.pad(np.asarray(prefix.real_RK), ((0, 0), (0, 7)), constant_values=True)
    codes = draw(prefix._replace(cache=cache, real_RK=real))
    np.testing.assert_array_equal(np.concatenate(codes, axis=1), data["steps3_cfg7p5:codes"])
