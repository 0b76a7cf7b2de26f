"""The tokenizer's training step on a tiny model: it learns, and every option does what it says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from config_files import tokenizer as configs
from tiny import KINDS, TINY

from tokenflow_jax.generation.model import GenerationConfig
from tokenflow_jax.nets.discriminator import PatchGAN, StyleGAN
from tokenflow_jax.nets.encoders import encoder_kind
from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.nets.vit import ViT
from tokenflow_jax.tokenizer.api import Tokenizer
from tokenflow_jax.tokenizer.losses import Game
from tokenflow_jax.tokenizer.model import TokenFlow
from tokenflow_jax.tokenizer.pyramid import map_of_vectors
from tokenflow_jax.tokenizer.quantizer import l2_normalize
from tokenflow_jax.tokenizer.teacher import Teacher
from tokenflow_jax.tokenizer.train import CodebookConfig, LossConfig, Trainer
from tokenflow_jax.train import optim

VIT = TINY.vit
MODEL = dataclasses.replace(TINY, teacher_width=TINY.vit.width)


def make_trainer(losses=None, codebook=None, learning_rate=3e-3, gan=False, **options):
    adam = optim.OptimizerConfig(learning_rate=learning_rate)
    losses = {"perceptual_weight": 0.0, "adversarial_weight": 0.5 if gan else 0.0} | (losses or {})
    return Trainer(
        model=TokenFlow(MODEL),
        losses=LossConfig(**losses),
        codebook=CodebookConfig(usage_window=500, **(codebook or {})),
        optimizer=optim.make_optimizer(adam, 100, options.get("trainable")),
        discriminator_optimizer=optim.make_optimizer(adam, 100),
        teacher=Teacher(ViT(VIT)),
        discriminator=PatchGAN(filters=4, layers=1) if gan else None,
        **options,
    )


@pytest.fixture(scope="module")
def frozen():
    return {"teacher": ViT(VIT).init(jax.random.key(9), jnp.zeros((1, 16, 16, 3)))["params"]}


@pytest.fixture(scope="module")
def batch():
    """Smooth color gradients: learnable in a few steps."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 255, (8, 2, 2, 3))
    return {"image": np.asarray(jax.image.resize(corners, (8, 16, 16, 3), "linear"), np.uint8)}


def first_state(trainer):
    """Jitted everywhere: compiled one by one, the draws differ in the last bit."""
    return jax.jit(trainer.init)(jax.random.key(0))


@functools.cache
def plain(**codebook):
    """Trainers shared by several tests, so that each step is traced once."""
    return make_trainer(codebook=codebook)


@functools.cache
def jitted(step):
    return jax.jit(step, donate_argnums=0)


def run(trainer, frozen, batch, steps):
    state, step, history = first_state(trainer), jitted(trainer.step), []
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max()) for x, y in pairs)


@pytest.fixture(scope="module")
def learned(frozen, batch):
    return run(make_trainer(losses={"scale_drop": 0.0}), frozen, batch, 40)


def test_it_learns_all_three_things(learned):
    _, history = learned
    first, last = history[0], history[-1]
    assert last["loss/reconstruction"] < 0.5 * first["loss/reconstruction"]
    assert last["loss/distillation"] < 0.7 * first["loss/distillation"]
    parts = ("reconstruction", "perceptual", "distillation", "codebook", "commitment", "entropy")
    total = sum(last[f"loss/{part}"] for part in parts)
    np.testing.assert_allclose(last["loss/total"], total, rtol=1e-5)
    assert 0 < last["usage/all"] <= 1 and last["perplexity/all"] >= 1


def test_gradient_shares_are_norms_at_the_code_vectors(frozen, batch, learned):
    """Against each loss differentiated by itself with respect to the vectors it trains."""
    trainer = make_trainer(losses={"scale_drop": 0.0})
    state, config, (_, history) = first_state(trainer), MODEL, learned
    images, model = batch["image"].astype(np.float32) / 127.5 - 1, trainer.model
    variables = {"params": state.params}
    pyramid, _ = jax.jit(model.apply)(variables, images)
    target = jax.jit(trainer.teacher.features)(frozen["teacher"], images)
    vectors = config.codebooks(state.params).look_up(pyramid.codes_BL)

    def distillation(vectors):
        map_BHWC = map_of_vectors(vectors, config.pyramid)
        seen = model.apply(variables, map_BHWC, method="decode_semantics")
        return 1 - jnp.mean(jnp.sum(l2_normalize(seen) * l2_normalize(target), -1))

    def pixels(vectors):
        map_BHWC = map_of_vectors(vectors, config.pyramid)
        drawn, _ = model.apply(variables, map_BHWC, method="decode_pixels")
        return jnp.mean((drawn - images) ** 2)

    def commitment(z):
        slices = config.pyramid.slices()
        means = [jnp.mean((z[:, where] - vectors[:, where]) ** 2) for where in slices]
        return 0.25 * sum(means) / len(means)

    gradients = {
        "distillation": jax.jit(jax.grad(distillation))(vectors),
        "pixels": jax.jit(jax.grad(pixels))(vectors),
        "commitment": jax.grad(commitment)(pyramid.z_BLC),
    }
    norms = {name: float(jnp.linalg.norm(one)) for name, one in gradients.items()}
    for name, norm in norms.items():
        share = history[0][f"gradient_share_codes/{name}"]
        np.testing.assert_allclose(share, norm / sum(norms.values()), rtol=1e-3)
    assert history[0]["gradient_share_picture/reconstruction"] == 1


@pytest.mark.slow
def test_one_scale_is_a_tokenizer_but_not_for_generation(frozen, batch):
    """The recipe of configs/tokenizer.py:b_256_single, at a tiny size."""
    assert configs.get_config("b_256_single").model.scales == (16,)
    single = dataclasses.replace(MODEL, scales=(4,))
    trainer = dataclasses.replace(make_trainer(), model=TokenFlow(single))
    state, history = run(trainer, frozen, batch, 6)
    assert history[-1]["loss/reconstruction"] < history[0]["loss/reconstruction"]
    assert set(history[0]) >= {"usage/scale_4", "usage/all"}
    tokenizer = Tokenizer(single, state.params)
    codes = tokenizer.encode(batch["image"])
    assert codes.shape == (8, 16) and tokenizer.decode(codes).shape == (8, 16, 16, 3)
    lm = LMConfig(vocabulary_size=100, width=8, layers=1, heads=1, kv_heads=1, mlp_width=8)
    with pytest.raises(ValueError, match=r"scales \(4,\) must begin with 1"):
        GenerationConfig(lm, (4,), codebook_size=32, image_start=37)


@functools.cache
def adaptive_gan():
    return make_trainer(gan=True, losses={"adaptive": True, "scale_drop": 0.0})


@pytest.mark.slow
def test_both_players_move_and_the_total_is_the_sum_of_its_parts(frozen, batch):
    trainer = adaptive_gan()
    before = first_state(trainer)
    after, history = run(trainer, frozen, batch, 2)
    assert distance(before.discriminator.params, after.discriminator.params) > 0
    assert distance(before.discriminator.batch_stats, after.discriminator.batch_stats) > 0
    m = history[-1]
    parts = ("reconstruction", "distillation", "codebook", "commitment")
    adversarial = m["adversarial/adaptive"] * m["adversarial/weight"] * m["loss/adversarial"]
    total = sum(m[f"loss/{part}"] for part in parts) + adversarial
    np.testing.assert_allclose(m["loss/total"], total, rtol=1e-4)
    assert m["adversarial/adaptive"] not in (0.0, 1.0)
    shares = [m[f"gradient_share_picture/{name}"] for name in ("reconstruction", "adversarial")]
    assert min(shares) > 0 and sum(shares) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [name for name in KINDS if name != "clip"])
def test_a_step_with_every_encoder(kind):
    """Encoder, teacher of its kind, detour, adaptive weight, discriminator: finite, and moving.

    test_golden.py takes steps at a published size; test_api.py encodes and decodes with every kind.
    """
    config = dataclasses.replace(KINDS[kind], teacher_width=KINDS[kind].vit.width)
    spec = encoder_kind(kind)
    teacher = spec.module(config.vit)
    gan = StyleGAN(max_channels=4) if kind == "vitamin" else PatchGAN(filters=4, layers=1)
    trainer = dataclasses.replace(
        make_trainer(gan=True, losses={"adaptive": True}),
        model=TokenFlow(config, remat=True),  # as the recipes of these encoders
        teacher=Teacher(teacher, spec.mean, spec.std),
        discriminator=gan,
    )
    shape = (2, config.image_size, config.image_size, 3)
    batch = {"image": np.random.default_rng(0).integers(0, 256, shape, np.uint8)}
    frozen = {"teacher": jax.jit(teacher.init)(jax.random.key(9), jnp.zeros(shape))["params"]}
    before = first_state(trainer)
    after, history = run(trainer, frozen, batch, 2)
    for metrics in history:
        assert all(np.isfinite(value) for value in metrics.values())
        assert metrics["adversarial/adaptive"] not in (0.0, 1.0)
    still = [
        jax.tree_util.keystr(path)
        for path, moved in jax.tree_util.tree_leaves_with_path(
            jax.tree.map(lambda a, b: jnp.abs(a - b).max(), before.params, after.params)
        )
        if moved == 0
    ]
    assert not still
    assert distance(before.discriminator.params, after.discriminator.params) > 0


@pytest.mark.slow
def test_nothing_adversarial_before_the_start(frozen, batch):
    late = make_trainer(gan=True, losses={"discriminator_start": 2})
    with_gan, history = run(late, frozen, batch, 3)
    without, plain_history = run(plain(), frozen, batch, 2)
    two_steps, _ = run(late, frozen, batch, 2)
    assert distance(two_steps.params, without.params) < 1e-6
    start = first_state(late).discriminator.params
    assert distance(two_steps.discriminator.params, start) == 0
    assert distance(with_gan.discriminator.params, start) > 0
    assert [m["adversarial/weight"] for m in history] == [0, 0, 0.5]
    np.testing.assert_allclose(
        *([m["loss/total"] for m in some[:2]] for some in (history, plain_history)), rtol=1e-5
    )


@pytest.mark.slow
def test_adaptive_weight_equals_two_backward_passes(frozen, batch):
    """The shortcut through the last convolution against differentiating the whole losses."""
    trainer = adaptive_gan()
    state = first_state(trainer)
    images = batch["image"].astype(np.float32) / 127.5 - 1

    def losses(kernel):
        decoder = state.params["pixel_decoder"]
        params = state.params | {
            "pixel_decoder": decoder | {"conv_out": decoder["conv_out"] | {"kernel": kernel}}
        }
        _, decoded = trainer.model.apply({"params": params}, images)
        player = state.discriminator
        game = Game(trainer.discriminator)
        logits, _ = game.judge(player.params, player.batch_stats, decoded.images_BHWC)
        return jnp.stack([jnp.mean((decoded.images_BHWC - images) ** 2), -jnp.mean(logits)])

    to_kernel = jax.jacrev(losses)(state.params["pixel_decoder"]["conv_out"]["kernel"])
    pixel, adversarial = (jnp.linalg.norm(g.ravel()) for g in to_kernel)
    _, history = run(trainer, frozen, batch, 1)
    expected = pixel / (adversarial + 1e-4)
    np.testing.assert_allclose(history[0]["adversarial/adaptive"], expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("gan", [False, True])
def test_accumulation_takes_the_same_step(frozen, batch, gan):
    """Exactly without a discriminator; with one its batch statistics are per microbatch."""
    losses = {"scale_drop": 0.0}
    whole, one = run(make_trainer(losses, gan=gan), frozen, batch, 1)
    parts, four = run(make_trainer(losses, gan=gan, accumulate=4), frozen, batch, 1)
    np.testing.assert_allclose(
        one[0]["loss/reconstruction"], four[0]["loss/reconstruction"], rtol=1e-5
    )
    np.testing.assert_array_equal(whole.usage.counts_SK, parts.usage.counts_SK)
    if not gan:
        rtol = 1e-3
        np.testing.assert_allclose(
            one[0]["gradient_norm/generator"], four[0]["gradient_norm/generator"], rtol=rtol
        )
    with pytest.raises(ValueError, match="batch of 8 rows does not split by accumulate=3"):
        run(make_trainer(accumulate=3), frozen, batch, 1)


@pytest.mark.slow
def test_only_trainable_parts_move(frozen, batch):
    shapes = jax.eval_shape(make_trainer().init, jax.random.key(0)).params
    trainer = make_trainer(trainable=optim.matching(shapes, ("pixel_decoder",)))
    before = first_state(trainer).params
    after = run(trainer, frozen, batch, 2)[0].params
    for part in before:
        moved = distance(before[part], after[part])
        assert moved > 0 if part == "pixel_decoder" else moved == 0, part


@pytest.mark.slow
def test_moving_average_codebook_gets_no_gradient(frozen, batch):
    trainer = make_trainer(codebook={"learning": "ema", "ema_decay": 0.5})
    start = first_state(trainer)
    state, history = run(trainer, frozen, batch, 3)
    assert distance(start.params["semantic_codebook"], state.params["semantic_codebook"]) > 1e-3
    adam = [s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu"))
            if hasattr(s, "mu")]  # fmt: skip
    assert jnp.abs(adam[0].mu["semantic_codebook"]).max() == 0
    assert history[-1]["loss/codebook"] < history[0]["loss/codebook"]


@pytest.mark.slow
def test_revival_raises_usage(frozen, batch):
    trainers = plain(), plain(revive_every=2)
    states = [run(trainer, frozen, batch, 12)[0] for trainer in trainers]
    used = [int((s.usage.counts_SK.sum(0) > 0).sum()) for s in states]
    assert used[1] > used[0]


@pytest.fixture(scope="module")
def dropping():
    """A trainer that drops a scale in every step, with the entropy loss and a moving average."""
    return make_trainer(losses={"entropy_weight": 0.1, "scale_drop": 1.0}, ema_decay=0.9)


@pytest.mark.slow
def test_entropy_and_scale_drop_are_live(dropping, frozen, batch):
    _, history = run(dropping, frozen, batch, 2)
    assert history[0]["loss/entropy"] != 0
    assert np.isfinite(history[1]["loss/total"])


@pytest.mark.slow
def test_moving_average_follows_slowly(dropping, frozen, batch):
    start = first_state(dropping).params
    state, _ = run(dropping, frozen, batch, 1)
    expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, start, state.params)
    assert distance(state.ema, expected) < 1e-6


@pytest.mark.slow
def test_a_step_is_a_function_of_seed_and_step(dropping, frozen, batch):
    a, b = (run(dropping, frozen, batch, 3)[0] for _ in range(2))
    assert distance(a.params, b.params) == 0
    other = run(dataclasses.replace(dropping, seed=1), frozen, batch, 3)[0]
    assert distance(a.params, other.params) > 0


@pytest.mark.slow
def test_the_step_is_donated_and_compiled_once(frozen, batch):
    state, step = first_state(plain()), jitted(plain().step)
    old = state.params["pixel_codebook"]
    for _ in range(3):
        state, _ = step(state, frozen, batch)
    assert old.is_deleted()
    assert step._cache_size() == 1  # also of what other tests took with it


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"pixel": "l3"}, "'l3' is not one of"),
        ({"adversarial": "wgan"}, "'wgan' is not one of"),
        ({"scale_drop": 2.0}, "not a probability"),
    ],
)
def test_bad_losses(fields, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**fields)


def test_bad_codebook():
    with pytest.raises(ValueError, match="'sgd' is not one of"):
        CodebookConfig(learning="sgd")
