"""The stage around the step, on a shrunken quickstart: runs, resuming, starts, what fits what."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
import several_devices_program
import tiny as tiny_config
from config_files import generation as configs

import tokenflow_jax as tfx
from tokenflow_jax import convert, encode, preflight, stages
from tokenflow_jax.data import pipeline
from tokenflow_jax.data.captions import batches as captions
from tokenflow_jax.generation.stage import GenerationStage
from tokenflow_jax.generation.train import LossConfig
from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.parallel import mesh
from tokenflow_jax.parallel.chips import parse_topology
from tokenflow_jax.tokenizer import api
from tokenflow_jax.train import loop
from tokenflow_jax.train.checkpoint import CheckpointError
from tokenflow_jax.train.optim import OptimizerConfig
from tokenflow_jax.train.run_config import LoopOptions
from tokenflow_jax.weights import quantized, rules
from tokenflow_jax.weights.language_model import language_model_template, save_language_model
from tokenflow_jax.weights.start import extend_vocabulary

VARIANTS = ("", "7b", "parity", "1b")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return str(tiny_config.write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t"))


@pytest.fixture(scope="module")
def data(tokenizer, tmp_path_factory):
    """Codes of the held-out emoji: 158 pairs are enough, and quick to read."""
    config = pipeline.DataConfig("emoji", split="heldout", image_size=16, augment="center")
    pictures = captions.Pictures(config)
    folder = tmp_path_factory.mktemp("codes") / "c"
    splits = {"train": pictures, "heldout": pictures}
    encode.encode(api.Tokenizer.load(tokenizer), splits, str(folder), source="emoji")
    return str(folder)


def tiny(tokenizer, data, **changes):
    """The quickstart's own config with a smaller model, so that it cannot rot."""
    config = configs.get_config()
    config.model.lm.update(width=16, layers=1, heads=2, kv_heads=2, mlp_width=24)
    config.tokenizer.path = tokenizer
    config.data.name, config.data.path = "codes", data
    config.total_steps, config.batch_size, config.optimizer.warmup_steps = 4, 4, 0
    config.log_every = config.checkpoint_every = 2
    config.image_every = config.eval_every = 0
    config.eval.batch_size, config.eval.examples, config.eval.sample_batch = 16, 32, 4
    config.eval.retrieval, config.eval.prompts = 4, ("red apple", "", "赤いリンゴ")
    config.sampling.passes = ((8, 0.9),)
    config.update_from_flattened_dict(changes)
    return config


def make(config):
    return GenerationStage(config, mesh.make_mesh({"data": 1}, jax.devices()[:1])).open()


def flat(tree):
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def trained(tokenizer, data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    config = tiny(tokenizer, data)
    return workdir, loop.train_and_evaluate(config, workdir, make(config)).state


def test_adapters_average_and_draw_as_their_merged_weights(trained, tokenizer, data, tmp_path):
    """The average follows what trains; the run's own samples are those of the merged model."""
    config = tiny(tokenizer, data, init_from=str(trained[0]), **{"lora.rank": 2})
    config.ema_decay, config.optimizer.learning_rate = 0.5, 1e-2
    stage = make(config)
    state = loop.train_and_evaluate(config, tmp_path, stage).state
    frozen = "lm/blocks/mlp/up/kernel"
    assert frozen not in rules.flatten(state.ema) and frozen in rules.flatten(state.params)
    for name in ("lm/head/kernel", "lm/blocks/norm1/scale", "level_embedding", f"{frozen}_lora_b"):
        assert not np.array_equal(rules.flatten(state.ema)[name], rules.flatten(state.params)[name])
    own = stage.generator.with_params(stage.weights(state))
    loaded = tfx.Generator.load(tmp_path)
    draw = ["red apple", "dog face"], [0, 1], stage._recipe
    np.testing.assert_array_equal(own.codes(*draw), loaded.codes(*draw))
    tied = tiny(tokenizer, data, **{"lora.rank": 2, "model.lm.tied_head": True})
    moments = flat(make(tied).state_shapes.opt_state)
    assert any(name.endswith("['embed']['embedding']") for name in moments)
    embedding = loaded.params["lm"]["embed"]["embedding"]
    np.testing.assert_array_equal(embedding, trained[1].params["lm"]["embed"]["embedding"])


def test_quantized_weights_draw(trained):
    """A model of int8 draws what its dequantized weights do; it is not saved."""
    plain = tfx.Generator.load(trained[0])
    drawn = tfx.Generator.load(trained[0], weights_dtype="int8")
    kernel = drawn.params["lm"]["blocks"]["mlp"]["up"]["kernel"]
    up = quantized.dequantize(kernel.array.qvalue, kernel.array.scale, "int8")
    old = np.asarray(plain.params["lm"]["blocks"]["mlp"]["up"]["kernel"])
    assert 0 < np.abs(up - old).max() <= np.abs(old).max() / 250
    codes = drawn.codes(["red apple"], [0], drawn.recipe)
    assert codes.shape == plain.codes(["red apple"], [0], plain.recipe).shape
    with pytest.raises(ValueError, match="without weights_dtype to save it"):
        drawn.save_pretrained(trained[0] / "saved")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_valid(variant):
    config = configs.get_config(variant)
    LossConfig(**config.losses)
    OptimizerConfig(**config.optimizer)
    captions.CaptionConfig(config.data.captions, config.data.drop_rate)
    assert LoopOptions.from_config(config).total_steps == config.total_steps
    assert variant in configs.__doc__
    if variant:
        stage = GenerationStage(config, mesh.make_abstract_mesh(config.mesh.to_dict(), 8), "tpu")
        assert stage.model_config.lm.vocabulary_size == 64769
        assert stage.batch_shapes["prefix"].shape == (256, 131)
        assert stage.trainer.suffix == (1533, 2492, 29958, 2)
        message = "--config.text_tokenizer=FOLDER of LLaMA-2"
        with pytest.raises(ValueError, match=message):
            make(config)


def test_the_paper_s_recipe():
    config, parity = configs.get_config("7b"), configs.get_config("parity")
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.warmup_steps, optimizer.weight_decay) == (
        5e-4, 5000, 0.1,
    )  # fmt: skip
    assert (optimizer.clip_norm, optimizer.decayed, optimizer.schedule) == (0.5, "all", "constant")
    assert config.data.drop_rate > 0 and config.sampling.negative_prompt == ""
    assert parity.data.drop_rate == 0 and parity.sampling.negative_prompt.startswith("lowres")


def test_a_run_leaves_what_people_look_for(trained):
    workdir, state = trained
    assert int(state.step) == 4
    names = {path.name for path in (workdir / "images").iterdir()}
    assert names == {"samples_0000004.png", "scales_0000004.png"}
    history = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = {key: value for line in history for key, value in line.items()}
    for name in ("loss/image", "accuracy/codes", "scale/loss_4", "eval/loss", "eval/rank_unseen"):
        assert name in last
    assert last["eval/chance_trained"] == pytest.approx(10 / 158)
    assert last["eval/images"] == 32
    assert any((workdir / "tensorboard").iterdir())


@pytest.mark.slow
def test_pictures_over_several_devices(trained):
    """Loading spreads the model over all of them; it draws the same."""
    result = several_devices_program.run("generator", trained[0], "red apple")
    codes = tfx.Generator.load(trained[0]).generate(["red apple"] * 3, passes=((1, 0.0),)).codes
    assert result == {"split": True, "found": codes.tolist()}


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not(trained, tokenizer, data, tmp_path):
    first = tiny(tokenizer, data, **{"eval.retrieval": 0})
    stage = make(first)
    first.total_steps = 2
    loop.train_and_evaluate(first, tmp_path, stage)
    again = tiny(tokenizer, data, **{"eval.retrieval": 0})
    resumed = loop.train_and_evaluate(again, tmp_path, make(again)).state
    whole = flat(trained[1])
    for name, value in flat(resumed).items():
        np.testing.assert_array_equal(value, whole[name], err_msg=name)


def test_a_checkpoint_says_all_about_itself(trained):
    workdir, state = trained
    generator = tfx.Generator.load(workdir)
    assert generator.config.scales == (1, 2, 4) and generator.recipe.passes == ((8, 0.9),)
    np.testing.assert_array_equal(
        generator.params["lm"]["head"]["kernel"], state.params["lm"]["head"]["kernel"]
    )
    drawn = generator.generate(["red apple", ""], seed=3)
    assert drawn.images.shape == (2, 16, 16, 3) and drawn.images.dtype == np.uint8
    assert drawn.recipe["tokenizer"]["fingerprint"] == generator.tokenizer.fingerprint
    json.dumps(drawn.recipe)


def test_runs_may_move(tokenizer, data, tmp_path, monkeypatch):
    """As a whole and under another name; they are loaded from anywhere."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    shutil.copytree(tokenizer, "runs/quickstart")
    config = tiny("runs/quickstart", data, total_steps=1)
    loop.train_and_evaluate(config, "runs/generation", make(config))
    codes = tfx.Generator.load("runs/generation").generate("red apple", seed=1).codes
    monkeypatch.chdir("/")
    place = tmp_path / "work" / "runs"
    for new in (place, tmp_path / "runs", tmp_path / "kept"):  # still there, moved, renamed
        place = place.rename(new)
        found = tfx.Generator.load(place / "generation")
        np.testing.assert_array_equal(found.generate("red apple", seed=1).codes, codes)
    os.rename(tmp_path / "kept" / "quickstart", tmp_path / "kept" / "q")
    with pytest.raises(ValueError, match=r"'runs/quickstart' of .*looked for it in .*kept"):
        tfx.Generator.load(tmp_path / "kept" / "generation")


def test_a_saved_model_is_complete(trained, tokenizer, data, tmp_path, monkeypatch):
    """Bit-equal weights and codes from the folder alone; it starts a run, and converts."""
    workdir, state = trained
    generator = tfx.Generator.load(workdir)
    generator.save_pretrained(tmp_path / "a" / "mine")
    with pytest.raises(FileExistsError):
        generator.save_pretrained(tmp_path / "a" / "mine")
    generator.save_pretrained(tmp_path / "a" / "mine", overwrite=True)
    os.rename(tmp_path / "a", tmp_path / "b")
    folder = tmp_path / "b" / "mine"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "images", "model.safetensors", "tokenizer",
    ]  # fmt: skip
    monkeypatch.chdir("/")
    loaded = tfx.Generator.from_pretrained(folder)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, generator.params)
    jax.tree.map(np.testing.assert_array_equal, loaded.tokenizer.params, generator.tokenizer.params)
    assert tfx.Tokenizer.load(folder).fingerprint == generator.tokenizer.fingerprint
    assert (loaded.config, loaded.recipe) == (generator.config, generator.recipe)
    one, two = (g.generate(["red apple", ""], seed=3) for g in (generator, loaded))
    np.testing.assert_array_equal(one.codes, two.codes)
    np.testing.assert_array_equal(np.stack(one.pictures), two.images)
    assert len(repr(loaded).splitlines()) <= 3
    card = (folder / "README.md").read_text()
    history = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = {key: value for line in history for key, value in line.items()}
    assert f"| rank_unseen | {last['eval/rank_unseen']:.4g} |" in card and "4 of 4" in card
    loaded.save_pretrained(tmp_path / "b" / "again")
    again = (tmp_path / "b" / "again" / "README.md").read_text()
    assert "| rank_unseen |" in again and "Pictures" not in again

    stage = make(tiny(str(folder / "tokenizer"), data, init_from=str(folder)))
    start = stage.init()  # draws no weights that are replaced
    assert all(np.isnan(x).all() for x in jax.tree.leaves(start.params))
    fresh, text = stage.warm_start(start)
    jax.tree.map(np.testing.assert_array_equal, fresh.params, state.params)
    assert text == f"raw weights of {folder}"
    run = ["--part=generation", f"--src={folder}", f"--dst={tmp_path / 'x.pt'}", "--to=torch"]
    assert convert.run(run) == 0
    found = tfx.Generator.load(tmp_path / "x.pt", folder / "tokenizer")
    jax.tree.map(np.testing.assert_array_equal, found.params, generator.params)


def test_an_exported_file_knows_its_tokenizers(trained, tmp_path):
    file = tmp_path / "mine.safetensors"
    run = ["--part=generation", f"--src={trained[0]}", f"--dst={file}", "--to=torch"]
    assert convert.run(run) == 0
    one, two = (tfx.Generator.load(p).generate("dog", seed=2).codes for p in (trained[0], file))
    np.testing.assert_array_equal(one, two)
    with pytest.raises(ValueError, match="does not hold variant '7b'"):
        tfx.Generator.load(file, variant="7b")


def test_another_tokenizer_is_refused(trained, tokenizer, data, tmp_path):
    other = tiny_config.write_tokenizer(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="made by another tokenizer"):
        tfx.Generator.load(trained[0], other)
    with pytest.raises(ValueError, match=r"data\.path.*made by another tokenizer"):
        make(tiny(str(other), data))
    config = tiny(tokenizer, data, **{"tokenizer.fingerprint": "0123456789abcdef"})
    with pytest.raises(ValueError, match=r"made by another tokenizer.*0123456789abcdef"):
        make(config)


@pytest.mark.slow
def test_a_run_does_not_change_its_tokenizer(trained, data, tmp_path, tokenizer):
    """Same workdir, other codes: refused before anything is overwritten."""
    other = tiny_config.write_tokenizer(tmp_path / "other", seed=1)
    pictures = captions.Pictures(
        pipeline.DataConfig("emoji", split="heldout", image_size=16, augment="center")
    )
    folder = str(tmp_path / "codes")
    splits = {"train": pictures, "heldout": pictures}
    encode.encode(api.Tokenizer.load(other), splits, folder, source="emoji")
    config = tiny(str(other), folder)
    with pytest.raises(CheckpointError, match=r"config\.tokenizer\.fingerprint"):
        loop.train_and_evaluate(config, trained[0], make(config))


@pytest.mark.parametrize(
    "path,value,message",
    [
        ("tokenizer.path", "/no/such/run", "train the quickstart's tokenizer with python -m"),
        ("tokenizer.path", "", "needs a trained image tokenizer"),
        ("tokenizer.variant", "huge", "'huge' is unknown"),
        ("text_tokenizer", "/no/folder", "is not 'bytes', 'words', 'words_and_bytes' or a folder"),
        ("model.codebook_size", 7, "model.codebook_size is 7, the tokenizers have 32"),
        ("data.encode", "never", "'never' is not one of"),
        ("data.path", "/no/such/data", "is not a data set of codes"),
        ("data.captions", ("a cat",), "must name some of"),
        ("sampling.passes", ((33, 0.0),), "top_k 33 must be 0 .off. to 32"),
        ("batch_size", 0, "batch_size"),
        ("loss_tokens", 0, "loss_tokens 0 must be at least 1"),
        ("dtype", "float16", "'float16' is not one of"),
    ],
)
def test_bad_values_name_the_remedy(tokenizer, data, path, value, message):
    config = tiny(tokenizer, data)
    with config.unlocked():
        config.update_from_flattened_dict({path: value})
    with pytest.raises(ValueError, match=message):
        make(config)


def test_a_generation_run_starts_another(trained, tokenizer, data):
    config = tiny(tokenizer, data, init_from=str(trained[0]))
    stage = make(config)
    state, text = stage.warm_start(stage.init())
    assert text.startswith("raw weights of")
    source = flat(trained[1].params)
    for name, value in flat(state.params).items():
        np.testing.assert_array_equal(value, source[name])
    wider = tiny(tokenizer, data, init_from=str(trained[0]), **{"model.lm.mlp_width": 32})
    stage = make(wider)
    with pytest.raises(ValueError, match=r"does not fit this model(.|\n)*mlp/down/kernel"):
        stage.warm_start(stage.init())


def test_a_language_model_starts_a_run(tokenizer, data, tmp_path):
    """Text rows are the language model's, padding is their mean, codes stay random."""
    lm = LMConfig(4096, 16, 1, 2, 2, 24)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), language_model_template(lm)
    )
    save_language_model(tmp_path / "llama", lm, params)
    config = tiny(tokenizer, data, init_from=str(tmp_path / "llama"))
    stage = make(config)
    fresh = jax.tree.map(np.asarray, stage.init().params)
    state, text = stage.warm_start(stage.init())
    assert "language model" in text
    ours = jax.tree.map(np.asarray, state.params)
    known = params["embed"]["embedding"]
    table, head = ours["lm"]["embed"]["embedding"], ours["lm"]["head"]["kernel"]
    np.testing.assert_array_equal(table[:4096], known)
    np.testing.assert_array_equal(head[:, :4096], params["head"]["kernel"])
    start = config.model.image_start
    assert start == 4096  # "words" has its own id of padding
    np.testing.assert_array_equal(table[start:], fresh["lm"]["embed"]["embedding"][start:])
    blocks = ours["lm"]["blocks"]
    np.testing.assert_array_equal(
        blocks["attention"]["q"]["kernel"], params["blocks"]["attention"]["q"]["kernel"]
    )
    np.testing.assert_array_equal(blocks["norm1"]["scale"], params["blocks"]["norm1"]["scale"])
    assert (blocks["attention"]["q_norm"]["scale"] == 1).all()
    narrow = tiny(tokenizer, data, **{"model.lm.width": 8})
    narrow.init_from = str(tmp_path / "llama")
    stage = make(narrow)
    with pytest.raises(ValueError, match="width is 16 there, 8 here"):
        stage.warm_start(stage.init())


def test_the_padding_row_becomes_the_mean_of_the_others():
    known = np.arange(6, dtype=np.float32).reshape(3, 2)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    joined = extend_vocabulary(np.full((6, 2), 9.0, np.float32), known, 4, 0, place)
    np.testing.assert_array_equal(joined, [[0, 1], [2, 3], [4, 5], [2, 3], [9, 9], [9, 9]])


@pytest.mark.slow
def test_codes_in_memory_and_pictures_on_the_fly_are_the_same_training(tokenizer, tmp_path):
    batches = {}
    for encode_when in ("once", "step"):
        config = tiny(tokenizer, "", **{"data.name": "folder", "data.encode": encode_when})
        config.data.name, config.data.path = "emoji", ""
        config.data.split = config.data.eval_split = "heldout"
        stage = make(config)
        batch = jax.device_put(next(stage.data()), stage.batch_sharding)
        _, metrics = stage.step(stage.init(), batch)
        batches[encode_when] = {name: float(value) for name, value in metrics.items()}
    assert batches["once"].keys() == batches["step"].keys()
    for name, value in batches["once"].items():
        assert value == pytest.approx(batches["step"][name], rel=1e-4), name


def test_preflight_knows_the_stage():
    assert stages.STAGES["generation"] == "tokenflow_jax.generation.stage:GenerationStage"
    config = configs.get_config("1b")
    config.batch_size = 64
    topology = parse_topology("h100:8")
    fits, text, *_ = preflight.report(config, topology, really=False)
    assert fits and "frozen tokenizer" in text and "generation on" in text
    fits, text, *_ = preflight.report(config, topology, sample=8, really=False)
    assert fits and "sampling on" in text and "codebooks" in text and "optimizer" not in text
    with pytest.raises(ValueError, match="cannot be split over 8 devices"):
        preflight.report(config, topology, sample=9)


def test_a_mixture_of_pictures_and_codes(tokenizer, data, tmp_path):
    changes = {"data.name": "mixture", "data.mixture": ("1 emoji as=drawn", f"2 codes '{data}'")}
    config = tiny(tokenizer, data, **changes, **{"data.encode": "step"})
    with pytest.raises(ValueError, match=r"data\.encode=once"):
        make(config)
    config.data.mixture = ("1 emoji split=heldout as=drawn drop_rate=0.5", "2 emoji as=whole")
    loop.train_and_evaluate(config, tmp_path, make(config))
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert "source/drawn/image" in lines and "source/whole/image" in lines
