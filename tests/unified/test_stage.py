"""The unified stage on a shrunken quickstart: runs, resuming, starts, drawing, conversion."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny as tiny_config
from config_files import generation, understanding, unified
from picture_files import encode, picture

from tokenflow_jax import convert, preflight, stages
from tokenflow_jax.data.captions.codes import CodesError
from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.parallel import mesh
from tokenflow_jax.train import loop, optim
from tokenflow_jax.train.run_config import LoopOptions
from tokenflow_jax.unified.model import UnifiedConfig
from tokenflow_jax.unified.names import PART
from tokenflow_jax.unified.train import LossConfig
from tokenflow_jax.weights import conversion, rules
from tokenflow_jax.weights.language_model import language_model_template, save_language_model

LM = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 2, "mlp_width": 24}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return str(tiny_config.write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t"))


def tiny(tokenizer, **changes):
    """The quickstart's own config with a smaller model, so that it cannot rot."""
    config = unified.get_config()
    config.model.lm.update(**LM)
    config.tokenizer.path = tokenizer
    config.data.max_length, config.data.buckets = 160, (200, 240)
    config.total_steps, config.batch_size, config.optimizer.warmup_steps = 4, 8, 0
    config.log_every = config.checkpoint_every = 2
    config.eval.update(max_new=4, batch_size=32, retrieval=3, sample_batch=2, prompts=("dog",))
    config.sampling.passes = ((8, 0.7),)
    config.update_from_flattened_dict(changes)
    return config


def make(config):
    return stages.make_stage(config, mesh.make_mesh({"data": 1}, jax.devices()[:1])).open()


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    """A finished run, and its stage."""
    workdir, config = tmp_path_factory.mktemp("run"), tiny(tokenizer)
    stage = make(config)
    return workdir, stage, loop.train_and_evaluate(config, workdir, stage).state


def test_it_evaluates_what_it_reads_and_draws(trained):
    workdir, _, _ = trained
    history = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    found = {name: value for line in history for name, value in line.items()}
    for name in ("loss_answer", "loss_draw", "loss_both", "exact_match", "cycle", "accuracy_codes"):
        assert np.isfinite(found[f"eval/{name}"]), name
    assert {"eval/top1_trained", "eval/top10_unseen", "kind/draw", "scale/loss_4"} <= {*found}
    grids = {path.name.split("_")[0] for path in (workdir / "images").iterdir()}
    assert grids == {"answers", "samples", "scales"}


def test_a_resumed_run_is_the_same_run(trained, tokenizer, tmp_path):
    workdir, _, whole = trained
    shutil.copytree(workdir / "checkpoints" / "2", tmp_path / "checkpoints" / "2")
    config = tiny(tokenizer)
    again = loop.train_and_evaluate(config, tmp_path, make(config)).state
    same = jax.tree.map(np.array_equal, whole.params, again.params)
    assert all(jax.tree.leaves(same))


def start_from(tokenizer, path, **changes):
    config = tiny(tokenizer, **changes)
    config.eval.examples = 8
    config.init_from = str(path)
    stage = make(config)
    fresh = jax.tree.map(np.asarray, stage.init().params)
    state, text = stage.warm_start(stage.init())
    return rules.flatten(fresh), rules.flatten(jax.tree.map(np.asarray, state.params)), text


def unchanged(fresh, params):
    return {name for name, array in params.items() if np.array_equal(array, fresh[name])}


def test_a_start_from_its_own_run(trained, tokenizer):
    _, params, text = start_from(tokenizer, trained[0])
    want = rules.flatten(jax.tree.map(np.asarray, trained[2].params))
    assert all(np.array_equal(params[name], want[name]) for name in want) and "raw weights" in text


def test_a_start_with_other_options_is_told(trained, tokenizer, caplog):
    """Options that no array's shape tells."""
    start_from(tokenizer, trained[0])
    assert "other options" not in caplog.text
    start_from(tokenizer, trained[0], **{"model.rope": "3d", "model.lm.rope_theta": 500.0})
    assert "rope was 1d, is 3d; rope_theta was 10000.0, is 500.0" in caplog.text


def test_a_start_from_a_language_model(tokenizer, tmp_path):
    lm = LMConfig(vocabulary_size=300, **LM, tied_head=True)
    rng = np.random.default_rng(0)
    shapes = language_model_template(lm)
    theirs = jax.tree.map(lambda x: rng.random(x.shape, np.float32), shapes)
    save_language_model(tmp_path / "lm", lm, theirs)
    fresh, params, text = start_from(
        tokenizer, tmp_path / "lm", **{"model.lm.qk_norm": False, "model.image_start": 300}
    )
    embedding = theirs["embed"]["embedding"]
    np.testing.assert_array_equal(params["lm/embed/embedding"][:300], embedding)
    np.testing.assert_array_equal(params["lm/head/kernel"][:, :300], embedding.T)
    assert not params["level_embedding"][0].any() and params["level_embedding"][1:].all()
    kept = {n for n in unchanged(fresh, params) if not n.startswith(("read_", "write_"))}
    assert kept == {"position_embedding"} and "language model" in text
    np.testing.assert_array_equal(
        params["lm/head/kernel"][:, 300:], fresh["lm/head/kernel"][:, 300:]
    )


@pytest.mark.parametrize("tied", [False, True])
def test_what_trains_beside_adapters(tied, tokenizer):
    config = tiny(tokenizer, **{"model.lm.tied_head": tied, "lora.rank": 2})
    stage = stages.make_stage(config, mesh.make_mesh({"data": 1}, jax.devices()[:1]))
    stage.open_tokenizer()
    trained = {*rules.flatten(jax.eval_shape(stage.adapters.take, stage.parameters))}
    parts = {name.split("/")[0] for name in trained}
    assert {"read_projector", "write_projector", "level_embedding", "position_embedding"} < parts
    assert ("lm/embed/embedding" if tied else "lm/head/kernel") in trained


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["understanding", "generation"])
def test_a_start_from_a_run_of_one_task(kind, tokenizer, tmp_path):
    files = {"understanding": understanding, "generation": generation}
    config = files[kind].get_config()
    config.model.lm.update(**LM, qk_norm=True)
    config.tokenizer.path = tokenizer
    config.total_steps, config.batch_size, config.optimizer.warmup_steps = 1, 4, 0
    config.text_tokenizer = "bytes"
    config.data.max_length = 80 if kind == "understanding" else 30
    if kind == "understanding":
        config.data.buckets, config.eval.max_new = (), 0
    else:
        config.sampling.passes = ((8, 0.7),)
        config.eval.update(retrieval=0, prompts=("dog",))
    config.eval.examples, config.eval.batch_size = 4, 4
    state = loop.train_and_evaluate(config, tmp_path / kind, make(config)).state
    theirs = rules.flatten(jax.tree.map(np.asarray, state.params))
    fresh, params, text = start_from(tokenizer, tmp_path / kind)
    mine = {"understanding": "read_projector", "generation": "write_projector"}[kind]
    for name, array in theirs.items():
        name = name.replace("projector", mine) if name.startswith("projector") else name
        got = params[name]
        if kind == "understanding" and name == "lm/embed/embedding":
            got = got[: len(array)]
        if kind == "understanding" and name == "lm/head/kernel":
            got = got[:, : array.shape[1]]
        np.testing.assert_array_equal(got, array, err_msg=name)
    other = {"read_projector": "write_projector/", "write_projector": "read_projector/"}[mine]
    assert {n for n in params if n.startswith(other)} <= unchanged(fresh, params)
    assert f"the {kind} model" in text and "from scratch" in text
    assert params["level_embedding"][0].any() == (kind == "generation")
    foreign = str(tiny_config.write_tokenizer(tmp_path / "foreign", seed=1))
    with pytest.raises(CodesError, match="made by another tokenizer"):
        start_from(foreign, tmp_path / kind)


def test_it_is_converted_there_and_back(trained, tokenizer, tmp_path):
    workdir, stage, state = trained
    file, ours = tmp_path / "model.safetensors", tmp_path / "ours"
    run = ["--part=unified", f"--src={workdir}", f"--dst={file}", "--to=torch"]
    assert convert.run(run) == 0
    source = conversion.open_source(file, PART)
    assert source.config == stage.model_config
    assert source.saved["tokenizer"]["fingerprint"] == stage.config.tokenizer.fingerprint
    back = ["--part=unified", f"--src={file}", f"--dst={ours}", "--to=orbax"]
    foreign = tiny_config.write_tokenizer(tmp_path / "foreign", seed=1)
    with pytest.raises(CodesError, match="made by another tokenizer"):
        start_from(str(foreign), file)
    assert convert.run(back) == 0
    want = rules.flatten(jax.tree.map(np.asarray, state.params))
    for path in (file, ours):
        arrays = conversion.open_source(path, PART).arrays
        assert {*arrays} == {*want}
        for name, array in want.items():
            np.testing.assert_array_equal(arrays[name].read(), array, err_msg=name)
    _, params, _ = start_from(tokenizer, file)
    assert all(np.array_equal(params[name], want[name]) for name in want)


def test_a_mixture_of_conversations_and_pairs(tokenizer, tmp_path):
    lines = []
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(encode(picture(i)))
        lines.append(json.dumps({"image": f"{i}.png", "caption": f"number {i}"}) + "\n")
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    mixture = (
        "1 emoji questions=kind|cycle as=chats",
        f"2 jsonl '{tmp_path}/pairs.jsonl' task=draw drop_rate=0.5 as=pairs",
    )
    config = tiny(tokenizer, **{"data.name": "mixture", "data.mixture": mixture})
    config.data.encode, config.total_steps = "step", 2
    config.eval.update(examples=6, retrieval=0, prompts=())
    stage = make(config)
    assert all("number" in request for request in stage._requests["trained"]._all().values())
    loop.train_and_evaluate(config, tmp_path / "run", stage)
    history = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    found = {name: value for line in history for name, value in line.items()}
    assert found["source/pairs/loss"] == found["kind/draw"]


@pytest.mark.parametrize("variant", ["", "emoji_coarse", "emoji", "7b", "7b_pretrain"])
def test_every_variant_is_valid(variant):
    config = unified.get_config(variant)
    optim.OptimizerConfig(**config.optimizer)
    LossConfig(**config.losses)
    assert LoopOptions.from_config(config).total_steps == config.total_steps
    assert variant in unified.__doc__
    if variant.startswith("emoji"):
        stage = stages.make_stage(config, mesh.make_abstract_mesh({}, 1))
        count = sum(x.size for x in jax.tree.leaves(stage.parameters))
        assert 5e6 < count < 6e6 and stage.model_config.codebook_size == 4096
    elif variant:
        device_mesh = mesh.make_abstract_mesh({"fsdp": 64}, 64)
        stage = stages.make_stage(config, device_mesh, "tpu")
        assert isinstance(stage.model_config, UnifiedConfig)
        count = sum(x.size for x in jax.tree.leaves(stage.parameters))
        assert 7.8e9 < count < 7.9e9
        frozen = (
            optim.matching(stage.parameters, tuple(config.trainable)) if variant != "7b" else {}
        )
        assert all(jax.tree.leaves(frozen.get("read_projector", {})))
        assert config.data.max_length > stage.drawn.codes + stage.vectors + 500


def test_coarse_scales_train_first(trained, tokenizer):
    _, whole, state = trained
    stage = make(tiny(tokenizer, **{"data.drawn_scales": 1}))
    assert stage.state_shapes.params == whole.state_shapes.params
    batch, every = next(iter(stage.data())), next(iter(whole.data()))
    places, all_places = np.asarray(batch["places"]), np.asarray(every["places"])
    # The same conversations, and code 0 alone in those that draw, as that of its picture.
    assert len(places[places < -1]) == (all_places < -1).sum() / stage.drawn.codes
    assert set((-2 - places[places < -1]) % stage.drawn.codes) == {0}
    # Requests have the room of the finer codes, whose scales are not shown: they are noise.
    assert stage.prompts.budget == whole.prompts.budget + stage.drawn.codes - 1
    grids = {name: grid.shape[0] for name, grid in stage.drawings(state.params).items()}
    assert grids["scales"] == grids["samples"]
    assert stage.at_the_end(state.params) == {}
    metrics = stage.step(stage.with_params(stage.init(), state.params), batch)[1]
    assert np.isfinite(metrics["loss/codes"]) and np.isnan(metrics["scale/loss_4"])
    every = make(tiny(tokenizer, **{"data.drawn_scales": len(stage.tokenizer_config.pyramid)}))
    assert every.drawn == whole.drawn and every.shown_scales == len(stage.tokenizer_config.pyramid)
    for count in (9, -1):
        with pytest.raises(ValueError, match=rf"data\.drawn_scales {count} is not in 0 to"):
            make(tiny(tokenizer, **{"data.drawn_scales": count}))


def test_values_that_do_not_go_with_the_tokenizers(tokenizer):
    with pytest.raises(ValueError, match=r"model\.image_start is 100, the tokenizers have 259"):
        make(tiny(tokenizer, **{"model.image_start": 100}))
    with pytest.raises(ValueError, match=r"vision_channels is 7"):
        make(tiny(tokenizer, **{"model.vision_channels": 7}))


@pytest.mark.slow
def test_preflight_counts_the_7b_model(capsys):
    run = ["--config=configs/unified.py:7b", "--topology=v5p:4x4x4", "--nocompile"]
    assert preflight.run(run) in (0, 1)
    assert "parameters: 78" in capsys.readouterr().out
