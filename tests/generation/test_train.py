"""One step of the generation model: the reference's loss and decay, and what our options change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny as tiny_config
from golden import generation as golden

import tokenflow_jax as tfx
from tokenflow_jax.generation.model import Generation, GenerationConfig
from tokenflow_jax.generation.names import generation_table, generation_template
from tokenflow_jax.generation.train import LossConfig, Trainer
from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.tokenizer.model import TokenFlow
from tokenflow_jax.train import optim
from tokenflow_jax.weights import conversion, rules
from tokenflow_jax.weights.lazy import LazyTensor

TOKENIZER = tiny_config.TINY
MODEL = Generation(
    GenerationConfig(
        lm=LMConfig(
            vocabulary_size=20 + 32, width=16, layers=2, heads=2, kv_heads=2, mlp_width=24,
            norms="after", qk_norm=True,
        ),
        scales=TOKENIZER.scales,
        codebook_size=32,
        image_start=20,
        code_channels=9,
    )
)  # fmt: skip
TRAINER = Trainer(MODEL, LossConfig(), optax.sgd(0.1), pad_id=19, suffix=(3, 4, 2), prefix_length=6)


@pytest.fixture(scope="module")
def params():
    return jax.jit(TRAINER.model.init_params)(jax.random.key(0))


@pytest.fixture(scope="module")
def frozen():
    return {"tokenizer": tiny_config.random_params(TOKENIZER, 0)}


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, 19, (4, 6)).astype(np.int32)
    for i in range(4):
        prefix[i, :i] = 19  # captions of different lengths
    images = rng.integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
    codes = rng.integers(0, 32, (4, 21)).astype(np.int32)
    return {"prefix": prefix, "image": images, "codes": codes}


def one_step(trainer, params, frozen, batch):
    state = trainer.init(None, jax.tree.map(jnp.copy, params))
    batch = {key: batch[key] for key in ("prefix", "codes")}
    return jax.jit(trainer.step)(state, frozen, batch)


@pytest.fixture(scope="module")
def plain(params, frozen, batch):
    """The step without options: state and metrics."""
    return one_step(TRAINER, params, frozen, batch)


@pytest.fixture(scope="module")
def of_codes(params, frozen, batch):
    """The step of a softmax over codes."""
    return one_step(with_losses(vocabulary="codes"), params, frozen, batch)


def with_losses(**changes):
    return dataclasses.replace(TRAINER, losses=LossConfig(**changes))


@pytest.mark.parametrize("name", ["s3", "s4"])
def test_losses_are_the_reference_s(name):
    case, data = golden.load(name), golden.stored(name, "train")
    ids, codes = data["input_ids"], data["codes"]
    trainer = Trainer(
        Generation(case.config), LossConfig(text_weight=1.0), optax.identity(), case.pad_id,
        tuple(ids[0, -4:].tolist()), 0,
    )  # fmt: skip
    frozen = {
        "tokenizer": {
            "semantic_codebook": case.codebooks.semantic_KC,
            "pixel_codebook": case.codebooks.pixel_KC,
        }
    }
    prefix = ids[:, : ids.shape[1] - codes.shape[1] - 4]
    loss, labels = jax.jit(trainer.loss), (prefix[:, 1:] != case.pad_id).sum()
    total, metrics = loss(case.params["params"], frozen, prefix, codes, labels)
    np.testing.assert_allclose(metrics["loss/image"], data["loss_vision"], atol=1e-5)
    np.testing.assert_allclose(metrics["loss/text"], data["loss_text"], atol=1e-5)
    np.testing.assert_allclose(total, data["loss_sum"], atol=1e-5)


def test_decay_acts_on_what_the_reference_decays():
    case = golden.load("s3")
    shapes = generation_template(case.config)
    marks = rules.flatten(optim._MASKS["all"](shapes))
    marked = {
        name: np.full(shape.shape, marks[name], np.float32)
        for name, shape in rules.flatten(shapes).items()
    }
    arrays = {
        name: LazyTensor(name, mark.shape, mark.dtype, lambda mark=mark: mark)
        for name, mark in marked.items()
    }
    tensors = conversion.torch_tensors(arrays, generation_table(case.config))
    decayed = sorted(name for name, tensor in tensors.items() if tensor.read().all())
    assert decayed == sorted(case.about["weight_decay_params"])


def test_codes_of_pictures_are_the_tokenizer_s(frozen, batch):
    encoding = dataclasses.replace(TRAINER, tokenizer=TokenFlow(TOKENIZER))
    codes = jax.jit(encoding.codes)(frozen, {"image": batch["image"]})
    expected = tfx.Tokenizer(TOKENIZER, frozen["tokenizer"]).encode(batch["image"])
    np.testing.assert_array_equal(codes, expected)
    assert TRAINER.codes(frozen, batch) is batch["codes"]


def test_accumulation_changes_nothing(params, frozen, batch):
    whole = with_losses(text_weight=1.0)
    first, metrics = one_step(whole, params, frozen, batch)
    np.testing.assert_allclose(
        metrics["loss/total"], metrics["loss/image"] + metrics["loss/text"], rtol=1e-6
    )
    parts = dataclasses.replace(whole, accumulate=2)
    second, same = one_step(parts, params, frozen, batch)
    for one, other in zip(*map(jax.tree.leaves, (first.params, second.params)), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, same[name], rtol=1e-4, err_msg=name)
    with pytest.raises(ValueError, match="batch of 4 rows does not split by accumulate=3"):
        one_step(dataclasses.replace(whole, accumulate=3), params, frozen, batch)


def test_softmax_over_the_codes_leaves_the_rest_of_the_head_alone(params, plain, of_codes):
    after, metrics = of_codes
    moved = np.abs(after.params["lm"]["head"]["kernel"] - params["lm"]["head"]["kernel"]).max(0)
    assert (moved[:20] == 0).all() and (moved[20:] > 0).any()
    # Fewer rivals: a code's loss falls by about log(52 / 32) at the start.
    assert float(metrics["loss/image"]) < float(plain[1]["loss/image"]) - 0.2


def test_text_without_a_weight_is_watched_not_learned(params, frozen, batch, plain):
    logged, metrics = one_step(with_losses(log_text=True), params, frozen, batch)
    assert "watched/text" in metrics and "loss/text" not in metrics
    for one, other in zip(*map(jax.tree.leaves, (logged.params, plain[0].params)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-7)


def test_scale_power_weighs_coarse_scales_more(params, frozen, batch, of_codes):
    trainer = with_losses(vocabulary="codes", scale_power=2.0)
    _, metrics = jax.jit(trainer.loss)(params, frozen, batch["prefix"], batch["codes"], 1)
    # side ** 2 codes of weight side ** -2: every scale counts the same.
    scales = [float(metrics[f"scale/loss_{side}"]) for side in TOKENIZER.scales]
    np.testing.assert_allclose(metrics["loss/image"], np.mean(scales), rtol=1e-5)
    counts = np.square(TOKENIZER.scales) / 21
    np.testing.assert_allclose(of_codes[1]["loss/image"], np.dot(counts, scales), rtol=1e-5)


def test_frozen_parameters_and_the_moving_average(params, frozen, batch):
    trainable = optim.matching(params, ("projector",))
    optimizer = optim.make_optimizer(optim.OptimizerConfig(clip_norm=0), 10, trainable)
    trainer = dataclasses.replace(TRAINER, trainable=trainable, optimizer=optimizer, ema_decay=0.75)
    after, _ = one_step(trainer, params, frozen, batch)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), after.params, params)
    assert all(jax.tree.leaves(moved["projector"]))
    assert not any(jax.tree.leaves({k: v for k, v in moved.items() if k != "projector"}))
    kernel, start = (p["projector"]["fc1"]["kernel"] for p in (after.params, params))
    np.testing.assert_allclose(
        after.ema["projector"]["fc1"]["kernel"], 0.75 * start + 0.25 * kernel, atol=1e-6
    )


def test_bad_losses_are_all_named():
    with pytest.raises(ValueError, match=r"text_weight -1(.|\n)*'words' is not"):
        LossConfig(text_weight=-1, vocabulary="words")
    with pytest.raises(ValueError, match="need vocabulary='all'"):
        LossConfig(log_text=True, vocabulary="codes")
