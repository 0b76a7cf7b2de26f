"""The quantizers as options: parameters, what a trained one becomes, what is refused by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from config_files import generation

import tokenflow_jax as tfx
from tokenflow_jax.generation.stage import GenerationStage
from tokenflow_jax.parallel import mesh
from tokenflow_jax.tokenizer import frozen
from tokenflow_jax.tokenizer.kinds import KINDS, MAPPINGS, PAPER, QuantizerConfig
from tokenflow_jax.tokenizer.model import TokenFlow
from tokenflow_jax.tokenizer.names import PART
from tokenflow_jax.tokenizer.state import CodebookConfig
from tokenflow_jax.tokenizer.train import LossConfig, Trainer
from tokenflow_jax.train import optim
from tokenflow_jax.weights.conversion import convert
from tokenflow_jax.weights.rules import flatten

TINY = dataclasses.replace(tiny.TINY, pixel_channels=5)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
# Every kind under the shared mapping, every mapping of the paper's kind, and a grid by itself.
FORMS = [
    *((kind, "shared") for kind in KINDS),
    *(("vq", mapping) for mapping in (*MAPPINGS, "heads") if mapping != "shared"),
    ("fsq", "separate"),
]
PASSED_ON = ("ibq",)  # kinds whose estimator passes a gradient on to codes
QUICK = (("simvq", "shared"), ("bsq", "shared"), ("fsq", "separate"))


def config_of(kind, mapping="shared"):
    """A tiny tokenizer of 32 codes, as many as the grids have points; a mapping "heads" has two."""
    if mapping == "heads":
        quantizer = QuantizerConfig(kind, heads=2)
        return dataclasses.replace(TINY, quantizer=quantizer, pixel_channels=4)
    if kind == "fsq":
        quantizer = QuantizerConfig(kind, mapping, (8, 4))
        return dataclasses.replace(TINY, quantizer=quantizer, pixel_channels=2)
    return dataclasses.replace(TINY, quantizer=QuantizerConfig(kind, mapping))


@pytest.mark.parametrize(("kind", "mapping"), [*FORMS, ("rotation", "heads")])
def test_features_are_quantized_and_the_gradient_reaches_what_learns(kind, mapping):
    config = config_of(kind, mapping)
    params = tiny.random_params(config, 0)
    features = np.random.default_rng(1).standard_normal((2, 4, 4, config.code_channels))
    model = TokenFlow(config)

    def loss(params, features, weight):
        made = model.apply({"params": params}, features, method="quantize")
        chosen = config.codebooks(params).look_up(made.codes_BL)
        pull = jnp.mean((jax.lax.stop_gradient(made.z_BLC) - chosen) ** 2)
        return jnp.sum(made.quantized_BHWC**3) + weight * pull, made

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (to_params, to_features), made = gradient(params, features, 1.0)
    codes = made.codes_BL
    assert codes.shape == (2, config.length) and codes.max() < config.codes
    learned = config.quantizer.parameters(32, {"semantic": 6, "pixel": config.pixel_channels})
    own = {name: np.abs(to_params[name]).max() for name in learned}
    frozen_ones = {name for name, largest in own.items() if largest == 0}
    assert frozen_ones == ({"semantic_codebook", "pixel_codebook"} if kind == "simvq" else set())
    assert np.abs(to_features).max(axis=(0, 1, 2)).all()
    (by_estimator, _), _ = gradient(params, features, 0.0)  # without a loss on codes
    reached = {name for name in learned if np.any(by_estimator[name])}
    assert reached == ({*learned} if config.quantizer.trains_codes else set())
    assert config.quantizer.trains_codes == (kind in PASSED_ON)
    again = jax.jit(lambda p, c: model.apply({"params": p}, c, method="features"))(params, codes)
    np.testing.assert_allclose(again, made.quantized_BHWC, atol=1e-5)


def test_the_default_is_the_paper_s_and_has_its_parameters():
    assert TINY.quantizer == PAPER and TINY.finished == TINY
    names = {n for n in tiny.random_params(TINY, 0) if n.endswith(("codebook", "map"))}
    assert names == {"semantic_codebook", "pixel_codebook"}
    made = dataclasses.replace(TINY, quantizer={"kind": "vq", "levels": []})
    assert made == TINY


@pytest.mark.parametrize(
    ("kind", "mapping"),
    [f if f in QUICK else pytest.param(*f, marks=pytest.mark.slow) for f in FORMS],
)
def test_a_trained_one_loads_as_what_it_is_without_its_training(kind, mapping, tmp_path):
    """Codes and vectors stay; those of a shared index are the paper's tokenizer, and convert."""
    config = config_of(kind, mapping)
    tiny.write_tokenizer(tmp_path / "run", config)
    loaded = tfx.Tokenizer.load(tmp_path / "run")
    plain = mapping == "shared" and kind not in ("lfq", "fsq")
    assert (loaded.config.quantizer == PAPER) == plain
    trained = tfx.Tokenizer(config, tiny.random_params(config, 0))
    codes = np.asarray(trained.encode(IMAGES))
    np.testing.assert_array_equal(loaded.encode(IMAGES), codes)
    np.testing.assert_allclose(loaded.features(codes), trained.features(codes), atol=1e-5)
    assert loaded.fingerprint == trained.fingerprint
    loaded.save_pretrained(tmp_path / "saved")
    again = tfx.Tokenizer.load(tmp_path / "saved")
    assert (again.config, again.fingerprint) == (loaded.config, loaded.fingerprint)
    jax.tree.map(np.testing.assert_array_equal, again.params, loaded.params)
    if plain:
        assert set(flatten(loaded.params)) == set(flatten(tiny.random_params(TINY, 0)))
    with pytest.raises(ValueError, match=f"this codebook has 0 to {config.codes - 1}"):
        loaded.decode(np.full((1, config.length), config.codes))
    if mapping == "heads" or kind == "simvq":
        for name in ("torch.safetensors", "torch.pt"):
            convert(tmp_path / "run", tmp_path / name, PART)
            again = tfx.Tokenizer.load(tmp_path / name)
            np.testing.assert_array_equal(again.encode(IMAGES), codes)
            np.testing.assert_allclose(again.decode(codes), trained.decode(codes), atol=1e-4)


def test_language_models_refuse_codes_without_a_shared_index():
    frozen.check_shared_index(config_of("simvq").finished, "run")
    for kind, mapping in (("vq", "separate"), ("vq", "joined"), ("vq", "heads"), ("fsq", "shared")):
        config = config_of(kind, mapping)
        with pytest.raises(ValueError, match=f"'run' has quantizer.kind '{kind}', mapping"):
            frozen.check_shared_index(config.finished, "run")


def test_a_generation_stage_says_so_before_it_starts(tmp_path):
    config = generation.get_config()
    config.tokenizer.path = str(tiny.write_tokenizer(tmp_path / "run", config_of("vq", "separate")))
    stage = GenerationStage(config, mesh.make_mesh({"data": 1}, jax.devices()[:1]))
    with pytest.raises(ValueError, match=r"run' has .* 'separate' .* train it with") as error:
        _ = stage.model_config
    assert "\n" not in str(error.value)


def test_fingerprints_tell_mappings_apart_and_estimators_not():
    params = tiny.random_params(TINY, 0)
    found = {
        name: tfx.Tokenizer(config_of(*name), params).fingerprint
        for name in (("vq", "shared"), ("rotation", "shared"), ("vq", "joined"), ("vq", "separate"))
    }
    assert found["vq", "shared"] == found["rotation", "shared"]
    assert len(set(found.values())) == 3


@pytest.mark.parametrize(
    ("quantizer", "fields", "message"),
    [
        ({"kind": "gumbel"}, {}, "quantizer.kind 'gumbel' is not one of"),
        ({"mapping": "both"}, {}, "quantizer.mapping 'both' is not one of"),
        ({"kind": "fsq"}, {}, "needs three or more for each pixel channel"),
        ({"levels": (8,)}, {}, "other kinds have none"),
        ({"kind": "ibq", "temperature": 0.0}, {}, "temperature 0.0 must be positive"),
        ({"kind": "bsq", "mapping": "joined"}, {}, "mapping 'joined' has none"),
        ({"kind": "bsq"}, {"codebook_size": 64}, "codebook_size 64 is not the 32 points"),
        ({"kind": "fsq", "levels": (8, 4)}, {}, "are not for pixel_channels 5"),
        ({"heads": 2, "kind": "ibq"}, {}, "heads 2 needs kind 'vq' or 'rotation'"),
        ({"heads": 2}, {}, "heads 2 does not divide semantic_channels 6 and pixel_channels 5"),
        ({"mapping": "separate"}, {"codebook_size": 65536}, "do not fit an int32 code"),
    ],
)
def test_what_cannot_be_is_said(quantizer, fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, quantizer=quantizer, **fields)


@pytest.mark.parametrize(
    ("kind", "mapping", "codebook", "refused"),
    [
        ("simvq", "shared", {"revive_every": 10}, "codebook.revive_every=10 cannot"),
        ("bsq", "shared", {"learning": "ema", "init": "kmeans"}, "'kmeans', codebook.learning="),
        ("ibq", "shared", {"learning": "ema"}, "codebook.learning='ema' cannot"),
        ("vq", "joined", {"init": "kmeans"}, "codebook.init='kmeans' cannot"),
        ("vq", "heads", {"learning": "ema"}, "codebook.learning='ema' cannot"),
        ("vq", "separate", {"revive_every": 10}, ""),
        ("ibq", "shared", {"revive_every": 10, "init": "kmeans"}, ""),
    ],
)
def test_codebooks_that_cannot_be_moved(kind, mapping, codebook, refused):
    def make():
        adam = optim.make_optimizer(optim.OptimizerConfig(), 10)
        model = TokenFlow(config_of(kind, mapping))
        return Trainer(model, LossConfig(), CodebookConfig(**codebook), adam)

    if not refused:
        make()
        return
    with pytest.raises(ValueError, match=refused):
        make()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mapping"),
    [f for f in FORMS[1:] if f not in (("rotation", "shared"), ("bsq", "shared"))],
)
def test_it_trains(kind, mapping):
    """All losses on; usage of each index; frozen codes stay, everything else moves.

    rotation is vq with another gradient, which test_estimators.py has; bsq is lfq on a sphere.
    """
    config = config_of(kind, mapping)
    revive = 0 if config.quantizer.fixed_codes else 2
    trainer = Trainer(
        model=TokenFlow(config),
        losses=LossConfig(
            perceptual_weight=0.0,
            adversarial_weight=0.0,
            distillation_weight=0.0,
            entropy_weight=0.1,
        ),
        codebook=CodebookConfig(usage_window=500, revive_every=revive),
        optimizer=optim.make_optimizer(optim.OptimizerConfig(learning_rate=3e-3), 100),
    )
    step, state = (
        jax.jit(trainer.step),
        trainer.init(jax.random.key(0), tiny.random_params(config, 0)),
    )
    before, history = state.params, []
    for _ in range(6):
        state, metrics = step(state, {}, {"image": IMAGES})
        history.append({name: float(value) for name, value in metrics.items()})
    assert all(np.isfinite(value) for line in history for value in line.values())
    assert history[-1]["loss/reconstruction"] < history[0]["loss/reconstruction"]
    names = {"separate": ["semantic_all", "pixel_all"], "heads": ["head_0_all", "head_1_all"]}
    names = names.get(mapping, ["all"])
    for name in names:
        assert 0 < history[-1][f"usage/{name}"] <= 1 <= history[-1][f"perplexity/{name}"] <= 32
    learned = config.quantizer.parameters(32, {"semantic": 6, "pixel": config.pixel_channels})
    still = {name for name in learned if np.array_equal(before[name], state.params[name])}
    assert still == ({"semantic_codebook", "pixel_codebook"} if kind == "simvq" else set())
