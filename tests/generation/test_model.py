"""The generation model against the reference: features, inputs, masks, losses, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_states
from golden import generation as golden

from tokenflow_jax.generation.model import Generation, GenerationConfig, next_scale_features
from tokenflow_jax.generation.names import generation_table
from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.nets.resize import bicubic_resize
from tokenflow_jax.tokenizer.pyramid import features_from_codes

CASES = ("s3", "s4", pytest.param("s9", marks=pytest.mark.slow))


def batch(case, data):
    """Return the stored sequences in the form that the model takes."""
    prefix = data["input_ids"].shape[1] - data["codes"].shape[1] - 4
    ids, codes = data["input_ids"], data["codes"]
    features = next_scale_features(jnp.asarray(codes), case.codebooks, case.config)
    return {
        "prefix_BP": ids[:, :prefix],
        "real_BP": ids[:, :prefix] != case.pad_id,
        "codes_BN": codes,
        "features_BMC": features,
        "suffix_BT": ids[:, -4:],
    }


def forward(inputs):
    return {name: x for name, x in inputs.items() if name != "codes_BN"}


@pytest.mark.parametrize("name", ("s3", "s4", "s9"))
def test_features_are_a_chain_and_the_decoders_input_is_not(name):
    case, data = golden.load(name), golden.stored(name, "features")
    codes, scales = jnp.asarray(data["codes"]), case.config.pyramid
    got = next_scale_features(codes, case.codebooks, case.config)
    np.testing.assert_allclose(got, data["next_scale_features"], atol=5e-6)
    compared = 0
    vectors = case.codebooks.look_up(codes)
    for i, where in enumerate(scales.slices()[1:], 1):
        refined = got[:, where.start - 1 : where.stop - 1] + vectors[:, where]
        want = data.get(f"refined_features_block{i}")
        if want is not None:
            compared += 1
            np.testing.assert_allclose(refined.reshape(want.shape), want, atol=5e-6)
    assert compared >= 2
    decoder_input = features_from_codes(codes, case.codebooks, scales)
    want = data["decoder_input"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(decoder_input, want, atol=5e-6)
    project = jax.jit(lambda p, x: Generation(case.config).apply(p, x, method=_project))
    every = case.config.lm.width // data["projected_features"].shape[-1]
    projected = project(case.params, got)[..., ::every]
    np.testing.assert_allclose(projected, data["projected_features"], atol=5e-6)


def _project(model, features):
    return model.projector(features)


@pytest.mark.parametrize("name", CASES)
def test_forward(name):
    """Inputs, mask, last hidden states, logits and the best code of every real position."""
    case, data = golden.load(name), golden.stored(name, "train")
    inputs = batch(case, data)
    model = Generation(case.config)

    @jax.jit
    def run(params):
        arrays = forward(inputs)
        hidden = model.apply(params, **arrays)
        arrays.pop("real_BP")
        embedded = model.apply(params, **arrays, method="inputs")
        logits = model.apply(params, hidden, method=lambda m, x: m.lm.logits(x))
        return embedded, hidden, logits

    embedded, hidden, logits = run(case.params)
    real = data["input_ids"] != case.pad_id
    if name == "s9":
        np.testing.assert_allclose(embedded[..., ::8], data["inputs_embeds_probe"], atol=5e-6)
        want, got = data["last_hidden_probe"], hidden[..., ::8]
        got_logits, want_logits = logits[..., data["probe_ids"]], data["probe_logits"]
    else:
        np.testing.assert_allclose(embedded, data["inputs_embeds"], atol=5e-6)
        want, got = data["hidden_states"][-1], hidden
        got_logits, want_logits = logits, data["logits"]
    np.testing.assert_allclose(got[real], want[real], atol=5e-5)
    np.testing.assert_allclose(got_logits[real], want_logits[real], atol=5e-5)
    # Rows of padding attend evenly to everything; nothing real reads them, but one predicts text.
    np.testing.assert_allclose(got_logits[~real], want_logits[~real], atol=1e-4)
    lse = jax.nn.logsumexp(logits, axis=-1)
    np.testing.assert_allclose(lse[real], data["logits_lse"][real], atol=5e-5)
    start = case.config.image_start
    best = jnp.argmax(logits[..., start:], axis=-1)
    np.testing.assert_array_equal(best[real], data["vq_argmax"][real])
    prefix = inputs["prefix_BP"].shape[1]
    length = real.shape[1]
    from tokenflow_jax.nets.masks import Mask

    allowed = Mask(jnp.asarray(real), case.config.blocks(prefix)).allowed(length, length)
    np.testing.assert_array_equal(allowed, data["attention_allowed"])


def test_every_layer(name="s4"):
    """The tokens after each block, through the final norm, by models of fewer layers."""
    case, data = golden.load(name), golden.stored(name, "train")
    inputs = forward(batch(case, data))
    real = data["input_ids"] != case.pad_id
    scale = case.state["model.norm.weight"]
    for layers in range(1, case.config.lm.layers):
        lm = dataclasses.replace(case.config.lm, layers=layers)
        model = Generation(dataclasses.replace(case.config, lm=lm))
        params = jax.tree.map(lambda x: x, case.params)
        blocks = params["params"]["lm"]["blocks"]
        params["params"]["lm"]["blocks"] = jax.tree.map(lambda x, n=layers: x[:n], blocks)
        hidden = jax.jit(model.apply)(params, **inputs)
        want = data["hidden_states"][layers]
        want = want / np.sqrt((want**2).mean(-1, keepdims=True) + case.config.lm.norm_eps) * scale
        np.testing.assert_allclose(hidden[real], want[real], atol=5e-5)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients(name):
    """Both losses, the norm of every parameter's gradient, whole gradients by name."""
    case, data = golden.load(name), golden.stored(name, "train")
    inputs = batch(case, data)
    model = Generation(case.config)

    def losses(params, text_weight):
        out = model.apply(params, **inputs, text=True, tokens=256, method="losses")
        image, text = out.image.mean(), out.text.sum() / inputs["real_BP"][:, 1:].sum()
        return image + text_weight * text, (image, text)

    gradient = jax.jit(jax.value_and_grad(losses, has_aux=True))
    table = generation_table(case.config)
    for kind, text_weight in (("vision", 0.0), ("sum", 1.0)):
        (total, (image, text)), gradients = gradient(case.params, text_weight)
        np.testing.assert_allclose(total, data[f"loss_{kind}"], atol=1e-5, rtol=0)
        np.testing.assert_allclose(image, data["loss_vision"], atol=1e-5, rtol=0)
        np.testing.assert_allclose(text, data["loss_text"], atol=1e-5, rtol=0)
        got = torch_states.to_torch(jax.tree.map(np.asarray, gradients["params"]), table)
        assert sorted(got) == sorted(data["grad_param_names"])
        norms = [np.linalg.norm(got[n].astype(np.float64)) for n in data["grad_param_names"]]
        np.testing.assert_allclose(norms, data[f"grad_norm_{kind}"], rtol=1e-4)
        for key in data:
            if key.startswith(f"grad_{kind}:"):
                want = data[key]
                bound = 1e-4 * np.abs(want).max()
                np.testing.assert_allclose(got[key.split(":")[1]], want, atol=bound, err_msg=key)
    assert not got["model.lvl_embed.weight"][1].any()  # never used


def test_the_bounds_tell_epsilon_and_gelu_apart(monkeypatch):
    """Only tight tolerances notice these faults, which change no code at all."""
    from tokenflow_jax.generation import model as generation
    from tokenflow_jax.nets import lm
    from tokenflow_jax.nets.layers import RMSNorm, tanh_gelu

    case, data = golden.load("s4"), golden.stored("s4", "train")
    inputs = forward(batch(case, data))
    real = data["input_ids"] != case.pad_id

    def off():
        model = Generation(case.config)
        hidden = model.apply(case.params, **inputs)
        logits = model.apply(case.params, hidden, method=lambda m, x: m.lm.logits(x))
        return np.abs(logits - data["logits"])[real].max()

    assert off() < 5e-5
    with monkeypatch.context() as patch:
        patch.setattr(generation, "exact_gelu", tanh_gelu)
        assert off() > 1e-4
    with monkeypatch.context() as patch:
        norm = lambda eps, *args, **kwargs: RMSNorm(max(eps, 1e-5), *args, **kwargs)  # noqa: E731
        patch.setattr(lm, "RMSNorm", norm)
        assert off() > 1e-4


def test_residual_inputs_are_those_of_the_scale_before():
    case, data = golden.load("s4"), golden.stored("s4", "features")
    config = dataclasses.replace(case.config, scale_inputs="residual")
    codes, scales = jnp.asarray(data["codes"]), config.pyramid
    got, vectors = next_scale_features(codes, case.codebooks, config), case.codebooks.look_up(codes)
    places = scales.slices()
    for before, where, side in zip(places, places[1:], scales.sides, strict=False):
        own = vectors[:, before].reshape(len(codes), side, side, -1)
        want = bicubic_resize(own, round((where.stop - where.start) ** 0.5))
        want = want.reshape(len(codes), -1, own.shape[-1])
        np.testing.assert_allclose(got[:, where.start - 1 : where.stop - 1], want, atol=1e-6)


def test_three_axes_are_those_of_scale_row_and_column():
    """A prefix of 6 ids, scales of 1, 4 and 16 codes, and `</img>`, for which it is text."""
    lm = LMConfig(40, 16, 1, 2, 2, 16)
    config = GenerationConfig(lm, (1, 2, 4), codebook_size=8, image_start=32, rope="3d")
    index = np.arange(28)
    numbers = np.where((index < 6) | (index > 26), -1, 21 + index - 6)  # a row's second picture
    got = config.positions(jnp.asarray(index)[None], jnp.asarray(numbers)[None])[0]
    np.testing.assert_array_equal(got[:6], np.repeat(index[:6, None], 3, axis=1))
    np.testing.assert_array_equal(got[6:10], [[6, 6, 6], [6, 6, 8], [6, 8, 6], [6, 8, 8]])
    fine = [[7, 5.5 + row, 5.5 + column] for row in range(4) for column in range(4)]
    np.testing.assert_array_equal(got[10:26], fine)
    np.testing.assert_array_equal(got[26:], [[26] * 3, [27] * 3])


def test_config_reports_everything():
    lm = {
        "vocabulary_size": 40, "width": 16, "layers": 1, "heads": 2, "kv_heads": 2, "mlp_width": 16,
    }  # fmt: skip
    config = GenerationConfig(lm, [1, 2], codebook_size=8, image_start=32)
    assert config.lm.width == 16 and config.scales == (1, 2)
    with pytest.raises(ValueError, match=r"begin with 1.*image_start=0.*"):
        GenerationConfig(lm, (2, 4), codebook_size=8, image_start=0)
    with pytest.raises(ValueError, match=r"rope '2d' is not one of 1d, 3d; scale_inputs ''"):
        GenerationConfig(lm, (1, 2), codebook_size=8, image_start=32, rope="2d", scale_inputs="")
    with pytest.raises(ValueError, match=r"vocabulary_size=40 does not hold 32 text ids and 9"):
        GenerationConfig(lm, (1, 2), codebook_size=9, image_start=32)
