"""The unified step: microbatches, kinds, frozen columns, pictures in the step, learning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from tokenflow_jax.data.chat import insertion
from tokenflow_jax.data.chat.insertion import Drawn
from tokenflow_jax.data.chat.templates import DRAWN_ID, IGNORE, IMAGE_ID
from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.tokenizer.model import TokenFlow
from tokenflow_jax.tokenizer.quantizer import Codebooks
from tokenflow_jax.train import optim
from tokenflow_jax.unified.model import Unified, UnifiedConfig
from tokenflow_jax.unified.train import LossConfig, Trainer

TOKENIZER = tiny.TINY
CODES, VECTORS = TOKENIZER.pyramid.tokens, TOKENIZER.pyramid.grid**2
LM = LMConfig(vocabulary_size=20 + 32, width=16, layers=2, heads=2, kv_heads=2, mlp_width=24)
MODEL = Unified(
    UnifiedConfig(LM, TOKENIZER.scales, 32, image_start=20, code_channels=9, vision_channels=9)
)
ROWS = {  # one of each kind, and one without a picture
    "answer": [3, IMAGE_ID, 4, 5, 6],
    "draw": [3, 7, DRAWN_ID, 6],
    "both": [3, 8, DRAWN_ID, IMAGE_ID, 9, 5, 6],
    "": [3, 10, 11, 6],
}


def trainer(**changes):
    sgd = {"optimizer": optax.sgd(0.1)}
    return Trainer(MODEL, TokenFlow(TOKENIZER), **{**sgd, **changes})


def a_batch(pairs=(("answer", "draw"), ("both", ""), ("draw", "answer"), ("", "both"))):
    """Rows of two conversations each."""
    rows = []
    for pair in pairs:
        parts = []
        for kind in pair:
            ids = np.array(ROWS[kind])
            labels = np.where(np.arange(len(ids)) > 1, ids, IGNORE)
            parts.append(insertion.merge_row(ids, labels, VECTORS, drawn=Drawn(CODES, (1,), (2,))))
        rows.append(insertion.join_rows(parts, VECTORS, CODES))
    batch = insertion.pad_rows(rows, 90)
    index = np.arange(2 * len(rows), dtype=np.int32).reshape(-1, 2) % 3
    return jax.tree.map(jnp.asarray, {**batch, "image_index": index})


@pytest.fixture(scope="module")
def frozen():
    params = tiny.random_params(TOKENIZER, 0)
    codes = np.random.default_rng(0).integers(0, 32, (3, CODES)).astype(np.int32)
    return {"codes": codes, "tokenizer": Codebooks.of(params).params()}


def run(one, frozen, batch=None):
    state = one.init(jax.random.key(0))
    after, metrics = jax.jit(one.step)(state, frozen, a_batch() if batch is None else batch)
    return state, after, metrics


@pytest.fixture(scope="module")
def plain(frozen):
    return run(trainer(), frozen)


def test_microbatches_weigh_every_label_alike(frozen, plain):
    _, after, metrics = run(trainer(accumulate=4), frozen)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.params, plain[1].params
    )
    for name, value in plain[2].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


def test_curves_tell_kinds_scales_and_sources_apart(frozen, plain):
    batch = a_batch()
    sources = jnp.array([[0, 1], [0, 0], [1, 0], [0, -1]])
    found = run(trainer(sources=("a", "b")), frozen, batch | {"source": sources})[2]
    for name, value in plain[2].items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)
    np.testing.assert_allclose(found["source/b/loss"], found["kind/draw"], rtol=1e-5)
    sizes = np.square(TOKENIZER.scales)
    scales = np.array([found[f"scale/loss_{side}"] for side in TOKENIZER.scales])
    np.testing.assert_allclose(found["loss/codes"], (scales * sizes).sum() / CODES, rtol=1e-5)
    for kind in ("answer", "draw", "both"):
        pairs = [(kind, kind)] * 2
        alone = run(trainer(), frozen, a_batch(pairs) | {"image_index": jnp.zeros((2, 2), int)})[2]
        others = [f"kind/{other}" for other in ("answer", "draw", "both") if other != kind]
        assert np.isfinite(alone[f"kind/{kind}"]) and np.isnan([alone[o] for o in others]).all()
    assert np.isfinite([value for name, value in found.items() if name.startswith("loss/")]).all()


def test_weights_of_losses(frozen, plain):
    found = plain[2]
    np.testing.assert_allclose(found["loss/total"], found["loss/text"] + found["loss/codes"])
    weighted = run(
        trainer(losses=LossConfig(text_weight=0.5, code_weight=2.0, scale_power=1.0)), frozen
    )[2]
    np.testing.assert_allclose(
        weighted["loss/total"], 0.5 * weighted["loss/text"] + 2 * weighted["loss/codes"], rtol=1e-6
    )
    sides, scales = np.array(TOKENIZER.scales, float), TOKENIZER.scales
    losses = np.array([weighted[f"scale/loss_{side}"] for side in scales])
    np.testing.assert_allclose(weighted["loss/codes"], np.average(losses, weights=sides), rtol=1e-5)
    with pytest.raises(ValueError, match=r"text_weight.*vocabulary 'codes'"):
        LossConfig(text_weight=-1, vocabulary="codes")


def test_the_first_stage_leaves_the_head_s_text_alone(frozen):
    names = (
        "read_projector", "write_projector", "level_embedding", "position_embedding", "lm/head",
    )  # fmt: skip
    trainable = optim.matching(jax.eval_shape(MODEL.init_params, jax.random.key(0)), names)
    options = optim.OptimizerConfig(learning_rate=1e-2)
    one = trainer(
        optimizer=optim.make_optimizer(options, 100, trainable),
        trainable=trainable,
        losses=LossConfig(learn_text_head=False),
    )
    before, after, _ = run(one, frozen)
    moved = jax.tree.map(lambda a, b: np.asarray(a != b), before.params, after.params)
    lm = moved["lm"]
    assert not lm["head"]["kernel"][:, :20].any() and lm["head"]["kernel"][:, 20:].all()
    assert not any(x.any() for x in jax.tree.leaves((lm["blocks"], lm["embed"], lm["norm"])))
    for name in ("read_projector", "write_projector"):
        assert all(x.any() for x in jax.tree.leaves(moved[name]))
    assert moved["position_embedding"].any(1).all()
    assert not moved["level_embedding"][1].any()  # the first scale has no features


def test_pictures_are_tokenized_in_the_step(frozen):
    params = tiny.random_params(TOKENIZER, 0)
    one, batch = trainer(), a_batch()
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    table = jax.jit(one.image_codes)(params, images)
    kept = {"codes": table, "tokenizer": frozen["tokenizer"]}
    want = jax.jit(one.loss)(one.init(jax.random.key(0)).params, kept, batch)
    batch["image"] = images[batch.pop("image_index")]
    got = jax.jit(one.loss)(one.init(jax.random.key(0)).params, {"tokenizer": params}, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


def test_it_learns_to_answer_and_to_draw(frozen):
    """Two pictures: one model tells them apart and draws each."""
    parts = []
    for request, answer in ((12, 14), (13, 15)):
        for ids in ([3, IMAGE_ID, 4, answer], [3, request, DRAWN_ID, 6]):
            ids = np.array(ids)
            labels = np.where(np.arange(4) > 1, ids, IGNORE)
            parts.append(insertion.merge_row(ids, labels, VECTORS, drawn=Drawn(CODES, (1,), (2,))))
    rows = [insertion.join_rows(parts[i : i + 2], VECTORS, CODES) for i in (0, 2)]
    index = np.array([[0, 0], [1, 1]], np.int32)
    batch = jax.tree.map(jnp.asarray, {**insertion.pad_rows(rows, 50), "image_index": index})
    options = optim.OptimizerConfig(learning_rate=2e-2)
    one = trainer(optimizer=optim.make_optimizer(options, 150))
    state, step = one.init(jax.random.key(0)), jax.jit(one.step)
    for _ in range(150):
        state, metrics = step(state, frozen, batch)
    assert metrics["accuracy/answers"] == 1 and metrics["accuracy/codes"] > 0.95
    swapped = {**batch, "image_index": batch["image_index"][::-1]}
    wrong = one.metrics(jax.jit(one.loss)(state.params, frozen, swapped))
    # Coarser codes are input, so that only the first one depends on the request alone.
    assert wrong["accuracy/answers"] < 1 and wrong["scale/loss_1"] > 2 > 0.1 > metrics["loss/total"]


def test_adapters_run_in_all_that_it_does(frozen):
    pytest.importorskip("qwix")
    from tokenflow_jax.weights.lora import Adapters, LoraConfig

    adapters = Adapters(LoraConfig(2), ("write_projector", "lm/head"), np.dtype(np.float32))
    one = dataclasses.replace(trainer(), model=adapters.model(MODEL), adapters=adapters)
    before, after, metrics = run(one, frozen)
    assert np.isfinite(metrics["loss/total"])
    same = jax.tree.map(lambda a, b: bool((a == b).all()), before.params, after.params)
    assert same["lm"]["embed"]["embedding"] and not same["lm"]["head"]["kernel"]
