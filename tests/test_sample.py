"""Drawing: reproducible pictures, benchmark layouts, recipes, and invalid requests."""

import dataclasses
import json
import re

import jax
import numpy as np
import optax
import pytest
import tiny as tiny_config
from absl import flags
from PIL import Image

import tokenflow_jax as tfx
from tokenflow_jax import cli, log, sample
from tokenflow_jax.data.built_in_text import ByteTokenizer
from tokenflow_jax.data.text import PromptEncoder
from tokenflow_jax.generation.api import Generator, Recipe
from tokenflow_jax.generation.model import Generation, GenerationConfig
from tokenflow_jax.generation.train import LossConfig, Trainer
from tokenflow_jax.nets.lm import LMConfig

CONFIG = GenerationConfig(
    lm=LMConfig(
        vocabulary_size=259 + 32, width=16, layers=1, heads=2, kv_heads=2, mlp_width=24,
        norms="after", qk_norm=True,
    ),
    scales=(1, 2, 4),
    codebook_size=32,
    image_start=259,
    code_channels=9,
)  # fmt: skip
# The negative prompt makes all prefixes as long as the budget: one program per number of images.
KEY = jax.random.key(0)
RECIPE = Recipe(guidance=2.0, passes=((8, 0.9),), negative_prompt="a bad picture")


@pytest.fixture(scope="module")
def generator():
    """Random weights, large enough that prompts matter."""
    tokenizer = tfx.Tokenizer(tiny_config.TINY, tiny_config.random_params(tiny_config.TINY, 0))
    trainer = Trainer(Generation(CONFIG), LossConfig(), optax.identity(), 0, (2,), 8)
    shapes = jax.eval_shape(trainer.model.init_params, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    prompts = PromptEncoder(ByteTokenizer(), 16)
    return Generator(CONFIG, params, tokenizer, prompts, RECIPE, source={"checkpoint": "random"})


def test_a_picture_depends_only_on_prompt_seed_and_number(generator):
    first = generator.generate(["red apple", "car"], images_per_prompt=2, seed=1)
    assert first.images.shape == (4, 16, 16, 3) and first.images.dtype == np.uint8
    assert len({codes.tobytes() for codes in first.codes}) == 4
    again = generator.generate(["car", "dog"], images_per_prompt=2, seed=1)
    np.testing.assert_array_equal(again.codes[:2], first.codes[2:])
    alone = generator.generate("car", seed=1)
    np.testing.assert_array_equal(alone.codes[0], first.codes[2])
    assert (generator.generate("car", seed=2).codes[0] != first.codes[2]).any()


def test_nothing_compiles_again(generator):
    generator.generate(["a", "b", "c"])
    sizes = [function._cache_size() for function in generator._compiled.values()]
    generator.generate(["another", "text", "of any length", "!"], guidance=3.0, seed=9)
    assert [function._cache_size() for function in generator._compiled.values()] == sizes


def test_the_shortest_prefix_gives_the_codes_of_the_whole_budget(generator):
    prompts, greedy = generator.prompts, ((1, 0.0),)
    sampler = generator._sampler(greedy)
    short, whole = (prompts.encode_all(["a dog", ""], shortest=s) for s in (True, False))
    assert (short.shape[1], whole.shape[1]) == (13, 21)
    codes = [
        sampler(
            generator.params, generator.codebooks, ids[:1], ids[1:], jax.random.split(KEY, 1), 2.0
        )
        for ids in (short, whole)
    ]
    np.testing.assert_array_equal(*codes)


def test_guidance_and_the_negative_prompt_count(generator):
    plain = generator.generate("dog", guidance=0.0).codes
    away = generator.generate("dog", guidance=8.0).codes
    assert (away != plain).any()
    other = generator.generate("dog", guidance=8.0, negative_prompt="a green cat").codes
    assert (away != other).any()
    # The first scale is never guided.
    assert away[0, 0] == plain[0, 0] == other[0, 0]


@pytest.mark.parametrize("prompt", ["", "赤い 🍎", "تفاحة", "a\x00\ud800"])
def test_hostile_prompts_work(generator, prompt):
    assert generator.generate(prompt).images.shape == (1, 16, 16, 3)


def test_a_long_prompt_is_cut_and_noted(generator):
    long = "an elephant walking under the sea " * 3
    cut = generator.generate(long, seed=4)
    same = generator.generate(long[:15] + "!", seed=4)  # cut to the same
    assert len(generator.prompts.encode(long)) == generator.prompts.prefix_length
    assert cut.images.shape == same.images.shape
    (note,) = generator.prompts.cut_notes()
    assert "2 different prompts were longer than the 16 ids" in note


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"passes": ((33, 0.5),)}, r"top_k 33 must be 0 \(off\) to 32, the codebook's size"),
        ({"passes": ((8, 1.5),)}, "top_p 1.5 must be"),
        ({"passes": 1}, "top_k 600 must be"),
        ({"passes": 4}, r"passes 4 must be one of \[1, 2, 3\]"),
        ({"passes": ()}, "there is no pass"),
        ({"guidance": -1.0}, "guidance -1.0 must not be negative"),
        ({"guidance": float("nan")}, "guidance nan must not be negative"),
        ({"guidance": float("inf")}, "guidance inf must not be .* infinite"),
        ({"images_per_prompt": 0}, "0 images of each"),
        ({"batch_size": 0}, "0 at a time"),
    ],
)
def test_invalid_values_are_refused(generator, changes, message):
    with pytest.raises(ValueError, match=message):
        generator.generate("dog", **changes)


def test_no_prompt_is_an_error(generator):
    with pytest.raises(ValueError, match="0 prompts"):
        generator.generate([])


def test_previews_end_at_the_picture(generator):
    drawn = generator.generate(["dog", "cat", "car"], seed=2)
    grown = list(generator.previews(drawn.codes))
    assert [step.shape for step in grown] == [(3, 16, 16, 3)] * 3
    np.testing.assert_array_equal(grown[-1], drawn.images)
    assert (grown[0] != grown[-1]).any()


def tasks_of(tmp_path, layout, content, prompts=()):
    path = tmp_path / "prompts"
    path.write_text(content, encoding="utf-8")
    return sample.read_tasks(layout, prompts, str(path))


def test_long_drawing_tells_how_far_it_is(generator, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(log, "_PROGRESS_S", -1.0)
    tasks = tasks_of(tmp_path, "plain", "a\nb\nc\n")
    assert sample.draw(generator, tasks, tmp_path / "out", RECIPE, batch_size=1) == 3
    assert re.fullmatch(r"draw: 2 of 3, [\d.]+ pictures/s, eta \w+", caplog.messages[-1])


def test_plain_files_and_their_recipe(generator, tmp_path):
    tasks = tasks_of(tmp_path, "plain", "\n赤い リ\n", ["a/b: c?"])
    assert [task.prompt for task in tasks] == ["a/b: c?", "赤い リ"]
    out = tmp_path / "out"
    drawn = sample.draw(generator, tasks, out, RECIPE, images_per_prompt=2, previews=True)
    assert drawn == 4
    files = {path.name for path in out.iterdir()}
    names = ("00000_a-b-c", "00001_赤い-リ")
    assert files == {
        "recipe.json", *(f"{name}_{i}{end}" for name in names for i in (0, 1)
                         for end in (".png", "_scales.png")),
    }  # fmt: skip
    about = json.loads((out / "recipe.json").read_text(encoding="utf-8"))
    assert about["recipe"]["guidance"] == 2.0 and about["recipe"]["passes"] == [[8, 0.9]]
    assert about["images"][3] == {
        "file": "00001_赤い-リ_1.png",
        "prompt": "赤い リ",
        "number": 1,
    }
    # The recipe is enough to draw a picture again.
    image = np.asarray(Image.open(out / about["images"][3]["file"]))
    recipe = {k: about["recipe"][k] for k in ("guidance", "negative_prompt", "seed", "passes")}
    again = generator.generate("赤い リ", images_per_prompt=2, **recipe).images[1]
    np.testing.assert_array_equal(image, again)


def test_stopped_drawing_continues(generator, tmp_path):
    tasks = tasks_of(tmp_path, "plain", "dog\ncat\ncar\npig\n")
    sample.draw(generator, tasks, tmp_path / "whole", RECIPE, batch_size=1)
    out = tmp_path / "out"
    sample.draw(generator, tasks, out, RECIPE)
    (out / "00001_cat.png").unlink()
    assert sample.draw(generator, tasks, out, RECIPE) == 1
    for file in out.glob("*.png"):
        assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()
    with pytest.raises(ValueError, match=r"with other settings \(recipe differ.*another --out"):
        sample.draw(generator, tasks, out, dataclasses.replace(RECIPE, seed=1))


def test_geneval_layout(generator, tmp_path):
    rows = [{"tag": "single_object", "include": [], "prompt": f"a photo of a {x}"} for x in "ab"]
    content = "\n".join(json.dumps(row) for row in rows)
    tasks = tasks_of(tmp_path, "geneval", content)
    sample.draw(generator, tasks, tmp_path / "out", RECIPE, layout="geneval", images_per_prompt=4)
    for i, row in enumerate(rows):
        folder = tmp_path / "out" / f"{i:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == row
        names = sorted(path.name for path in (folder / "samples").iterdir())
        assert names == ["0000.png", "0001.png", "0002.png", "0003.png"]
        assert Image.open(folder / "samples" / "0003.png").size == (16, 16)
    with pytest.raises(ValueError, match="line 2 is no JSON object with a prompt"):
        tasks_of(tmp_path, "geneval", '{"prompt": "x"}\n{"text": "y"}')


def test_dpg_layout(generator, tmp_path):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "COCOval_1.txt").write_text("a dog\n")
    (prompts / "partiprompts2.txt").write_text("a cat")
    tasks = sample.read_tasks("dpg", (), str(prompts))
    out = tmp_path / "out"
    sample.draw(generator, tasks, out, RECIPE, layout="dpg", images_per_prompt=4)
    # The scorer takes every file in the folder for a grid.
    assert {path.name for path in out.iterdir()} == {"COCOval_1.png", "partiprompts2.png"}
    assert (tmp_path / "out.recipe.json").is_file()
    grid = np.asarray(Image.open(out / "COCOval_1.png"))
    own = generator.generate("a dog", images_per_prompt=4).images
    np.testing.assert_array_equal(grid[:16, :16], own[0])
    np.testing.assert_array_equal(grid[:16, 16:], own[1])
    np.testing.assert_array_equal(grid[16:, :16], own[2])
    with pytest.raises(ValueError, match="4 pictures, not 2"):
        sample.draw(generator, tasks, out, RECIPE, layout="dpg", images_per_prompt=2)


@pytest.mark.parametrize(
    ("layout", "prompts", "path", "message"),
    [
        ("plain", (), None, "nothing to draw"),
        ("geneval", (), None, "needs --prompts"),
        ("dpg", ("x",), "there", "from --prompts alone"),
        ("dpg", (), "no/folder", "no folder with .txt files"),
        ("plain", (), "no/file", "cannot be read as UTF-8"),
    ],
)
def test_wrong_prompts(layout, prompts, path, message):
    with pytest.raises(ValueError, match=message):
        sample.read_tasks(layout, prompts, path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), RECIPE),
        (("--seed=5", "--guidance=0"), dataclasses.replace(RECIPE, seed=5, guidance=0.0)),
        (("--top_k=4",), dataclasses.replace(RECIPE, passes=((4, 0.9),))),
        (("--top_p=0.5",), dataclasses.replace(RECIPE, passes=((8, 0.5),))),
        (("--passes=3",), dataclasses.replace(RECIPE, passes=3)),
        (("--negative_prompt=x",), dataclasses.replace(RECIPE, negative_prompt="x")),
    ],
)
def test_flags_change_the_checkpoint_s_recipe(arguments, expected):
    options = flags.FlagValues()
    sample.define_flags(cli.Define(options))
    options(["sample", *arguments])
    assert sample.recipe_of_flags(RECIPE, options) == expected
    options(["sample", "--passes=2", "--top_k=3"])
    with pytest.raises(ValueError, match="brings its own filters"):
        sample.recipe_of_flags(RECIPE, options)


def command(generator, monkeypatch, tmp_path, *arguments):
    monkeypatch.setattr(Generator, "load", lambda *_, **__: generator)
    options = flags.FlagValues()
    sample.define_flags(cli.Define(options))
    options(["sample", "--checkpoint=x", "--prompt=dog", f"--out={tmp_path / 'out'}", *arguments])
    sample.main(options)


def test_an_edit_is_drawn_and_shown_beside_the_original(generator, monkeypatch, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    mask = np.arange(16)[None].repeat(16, axis=0) < 8
    Image.fromarray(picture).save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "m.png")
    flags = (f"--image={tmp_path / 'a.png'}", f"--mask={tmp_path / 'm.png'}", "--keep=1")
    command(generator, monkeypatch, tmp_path, *flags)
    drawn = generator.generate("dog", image=picture, mask=mask, keep=1)
    out = tmp_path / "out"
    np.testing.assert_array_equal(np.asarray(Image.open(out / "00000_dog.png")), drawn.images[0])
    row = np.asarray(Image.open(out / "00000_dog_edit.png"))
    rebuilt = np.asarray(generator.tokenizer.reconstruct(picture))
    white = np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)
    for i, cell in enumerate((picture, rebuilt, white, drawn.images[0])):
        np.testing.assert_array_equal(row[2:18, 2 + 18 * i : 18 + 18 * i], cell)
    about = json.loads((out / "recipe.json").read_text())["recipe"]["edit"]
    assert about["keep"] == 1 and about["image"] == str(tmp_path / "a.png")
    Image.fromarray(~mask).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match=r"with other settings \(recipe differ"):
        command(generator, monkeypatch, tmp_path, *flags)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image=no.png", "--keep=1"], r"image 'no\.png': cannot be read"),
        (["--image={a}", "--mask={black}"], r"--mask=.*black\.png is black: paint white"),
        (["--image={a}", "--outpaint=1,x"], "--outpaint=1,x: give 4 numbers"),
        (["--image={a}", "--strength=2"], "strength 2.0 must be 0"),
        (["--mask={black}"], "need an image"),
    ],
)
def test_an_edit_that_cannot_be_made(generator, monkeypatch, tmp_path, arguments, message):
    names = {name: tmp_path / f"{name}.png" for name in ("a", "black")}
    for path in names.values():
        Image.new("RGB", (16, 16)).save(path)
    with pytest.raises(ValueError, match=message):
        command(generator, monkeypatch, tmp_path, *(text.format(**names) for text in arguments))


def test_tokenizers_of_another_model_are_refused(generator):
    words = dataclasses.replace(generator, prompts=PromptEncoder(ByteTokenizer(), 8))
    words.prompts.image_start = 300
    with pytest.raises(ValueError, match=r"has 300 ids .padding included., the model 259"):
        words.check()
    config = dataclasses.replace(CONFIG, scales=(1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"scales are \(1, 2, 4\), the model's \(1, 2, 3, 4\)"):
        dataclasses.replace(generator, config=config).check()


def test_only_a_line_feed_ends_a_prompt(tmp_path):
    text = "a sign\u2028hello\x85\x0cthere\r\nb"
    (tmp_path / "p").write_bytes(text.encode())
    prompts = [task.prompt for task in sample.read_tasks("plain", (), str(tmp_path / "p"))]
    assert prompts == ["a sign\u2028hello\x85\x0cthere", "b"]
    rows = [{"prompt": "a\u2028b\x85"}, {"prompt": "c"}]
    for content in (
        "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        json.dumps(rows, indent=2, ensure_ascii=False),
    ):
        tasks = tasks_of(tmp_path, "geneval", content)
        assert [task.prompt for task in tasks] == ["a\u2028b\x85", "c"]
        assert [json.loads(task.about) for task in tasks] == rows
        assert not any("\n" in task.about for task in tasks)


@pytest.mark.parametrize("row", ['{"prompt": 3}', '{"prompt": ["a"]}', "[" * 10**5, "1" * 5000])
def test_a_prompt_is_text(tmp_path, row):
    with pytest.raises(ValueError, match="line 2 is no JSON object with a prompt") as error:
        tasks_of(tmp_path, "geneval", '{"prompt": "x"}\n' + row)
    assert len(str(error.value)) < 500


def test_hidden_files_are_no_prompts_and_empty_ones_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("a red apple")
    (tmp_path / "._a.txt").write_bytes(b"\0\5\x16\7\xb0")
    assert [task.name for task in sample.read_tasks("dpg", (), str(tmp_path))] == ["a"]
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"are empty:\n  - b$"):
        sample.read_tasks("dpg", (), str(tmp_path))
    with pytest.raises(ValueError, match="cannot be read as UTF-8"):
        sample.read_tasks("plain", (), "/dev/zero")


def test_a_recipe_that_is_no_json_is_named(generator, tmp_path):
    tasks = [sample.Task("half \ud83d", "a")]
    sample.draw(generator, tasks, tmp_path / "out", RECIPE)
    assert sample.draw(generator, tasks, tmp_path / "out", RECIPE) == 0  # the same recipe
    (tmp_path / "out" / "recipe.json").write_text("[1")
    with pytest.raises(ValueError, match=r"recipe\.json is not JSON.*choose another --out"):
        sample.draw(generator, tasks, tmp_path / "out", RECIPE)


def test_the_folder_is_tried_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(Generator, "load", lambda *_, **__: pytest.fail("too late"))
    (tmp_path / "file").write_text("in the way")
    options = flags.FlagValues()
    sample.define_flags(cli.Define(options))
    options(["sample", "--checkpoint=x", "--prompt=a", f"--out={tmp_path / 'file' / 'out'}"])
    with pytest.raises(OSError, match="cannot write into the folder"):
        sample.main(options)
