"""Sampling: the reference's codes and logits in every setting, with the cache and without."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recomputed_sampling
from golden import generation as golden

from tokenflow_jax.generation.model import Generation
from tokenflow_jax.generation.sample import Sampler


def prompts(data):
    ids = jnp.asarray(data["prefix_ids"], jnp.int32)
    half = len(ids) // 2
    return ids[:half], ids[half:]


def sampler(case, passes=((1, 0.0),)):
    return jax.jit(Sampler(Generation(case.config), case.pad_id, passes))


@functools.cache
def traced(name, passes, method):
    """The compiled program, with the watched logits of every pass; all passes are greedy."""
    case = golden.load(name)
    greedy = Sampler(Generation(case.config), case.pad_id, ((1, 0.0),) * passes)
    draws = greedy.draws
    if method != "cache":
        draws = functools.partial(recomputed_sampling.draws, greedy, method)

    def run(watched, *args):
        return [(d.scale, d.index, d.codes_BL, d.logits_BLK[..., watched]) for d in draws(*args)]

    return jax.jit(run)


QUICK = (("s3", 1, "cache"), ("s4", 3, "cache"))
SETTINGS = [
    pytest.param(*setting, marks=[] if setting in QUICK else [pytest.mark.slow])
    for setting in (
        ("s3", 1, "cache"),
        ("s4", 3, "cache"),
        ("s9", 1, "cache"),
        ("s9", 2, "cache"),
        ("s3", 3, "whole"),
        ("s4", 2, "so_far"),
        ("s9", 1, "whole"),
    )
]


@pytest.mark.parametrize("name, passes, method", SETTINGS)
def test_equals_the_reference(name, passes, method):
    """Codes, the code of every pass, and guided logits; guidance 7.5 and 0 in one program."""
    case, data = golden.load(name), golden.stored(name, "generate")
    run = traced(name, passes, method)
    keys = jax.random.split(jax.random.key(0), 2)
    watched = jnp.asarray(data[f"steps{passes}_cfg7p5:probe_ids"]) - case.config.image_start
    params = case.params["params"]
    for key, guidance in (("7p5", 7.5), ("0", 0.0)):
        start = f"steps{passes}_cfg{key}:"
        draws = run(watched, params, case.codebooks, *prompts(data), keys, guidance)
        last = {int(scale): codes for scale, _, codes, _ in draws}
        codes = np.concatenate(list(last.values()), axis=1)
        np.testing.assert_array_equal(codes, data[start + "codes"])
        order = [[scale, index] for scale, index, _, _ in draws]
        np.testing.assert_array_equal(order, data[start + "call_scale_loop"])
        every = np.concatenate([codes for _, _, codes, _ in draws], axis=1)
        np.testing.assert_array_equal(every, data[start + "argmax"])
        want = data.get(start + "probe_logits")
        assert want is not None or guidance == 0
        if want is not None:
            got = np.concatenate([logits for _, _, _, logits in draws], axis=1)
            np.testing.assert_allclose(got, want, atol=2e-4, rtol=0)
    assert run._cache_size() == 1  # one program, whatever the guidance


@pytest.mark.parametrize("option", [{"rope": "3d"}, {"scale_inputs": "residual"}])
def test_options_are_the_same_with_the_cache_and_without(option):
    """In two passes, whatever the padding in front; and each changes what is drawn."""
    case, data = golden.load("s3"), golden.stored("s3", "generate")
    config = dataclasses.replace(case.config, **option)
    passes = ((1, 0.0),) * 2
    plain, other = (Sampler(Generation(c), case.pad_id, passes) for c in (case.config, config))
    ids, keys = prompts(data), jax.random.split(jax.random.key(0), 2)
    longer = [jnp.pad(x, ((0, 0), (5, 0)), constant_values=case.pad_id) for x in ids]

    @jax.jit
    def run(params):
        recomputed = functools.partial(recomputed_sampling.draws, other, "so_far")
        draws = ((plain.draws, ids), (other.draws, ids), (recomputed, ids), (other.draws, longer))
        return [list(draw(params, case.codebooks, *x, keys, 7.5)) for draw, x in draws]

    plain, *found = run(case.params["params"])
    assert any((a.codes_BL != b.codes_BL).any() for a, b in zip(plain, found[0], strict=True))
    for want in found[1:]:
        for one, draw in zip(found[0], want, strict=True):
            np.testing.assert_array_equal(one.codes_BL, draw.codes_BL)
            np.testing.assert_allclose(one.logits_BLK, draw.logits_BLK, atol=2e-4, rtol=0)


def test_codes_are_the_last_passes_of_all_scales():
    case, data = golden.load("s4"), golden.stored("s4", "generate")
    keys = jax.random.split(jax.random.key(0), 2)
    run = sampler(case, ((1, 0.0),) * 3)
    codes = run(case.params["params"], case.codebooks, *prompts(data), keys, 7.5)
    np.testing.assert_array_equal(codes, data["steps3_cfg7p5:codes"])


def test_without_a_negative_prompt_equals_no_guidance():
    case, data = golden.load("s4"), golden.stored("s4", "generate")
    prompt, _ = prompts(data)
    keys = jax.random.split(jax.random.key(0), 2)
    codes = sampler(case)(case.params["params"], case.codebooks, prompt, None, keys)
    np.testing.assert_array_equal(codes, data["steps1_cfg0:codes"])


@pytest.mark.slow
def test_one_negative_prompt_serves_all():
    case, data = golden.load("s4"), golden.stored("s4", "generate")
    prompt, negative = prompts(data)
    keys = jax.random.split(jax.random.key(0), 2)
    codes = sampler(case)(case.params["params"], case.codebooks, prompt, negative[:1], keys, 7.5)
    np.testing.assert_array_equal(codes, data["steps1_cfg7p5:codes"])


def test_rows_are_independent():
    """Random draws: equal seeds give equal images, in any batch; other seeds give others."""
    case, data = golden.load("s3"), golden.stored("s3", "generate")
    prompt, negative = prompts(data)
    run = functools.partial(sampler(case, ((100, 0.9),)), case.params["params"], case.codebooks)
    keys = jax.random.split(jax.random.key(5), 2)
    single = negative[:1]  # both rows of `negative` are the same
    both = run(prompt, single, keys)
    alone = run(prompt[1:], single, keys[1:])
    np.testing.assert_array_equal(alone[0], both[1])
    others = jax.random.split(jax.random.key(6), 2)
    assert (run(prompt, single, others) != both).any()
    assert int(both.max()) < case.config.codebook_size


@pytest.mark.slow
def test_prefixes_of_another_length_are_another_bucket():
    """More padding in front changes nothing but the program."""
    case, data = golden.load("s4"), golden.stored("s4", "generate")
    longer = [jnp.pad(ids, ((0, 0), (5, 0)), constant_values=case.pad_id) for ids in prompts(data)]
    keys = jax.random.split(jax.random.key(0), 2)
    codes = sampler(case)(case.params["params"], case.codebooks, *longer, keys, 7.5)
    np.testing.assert_array_equal(codes, data["steps1_cfg7p5:codes"])


def test_everything_that_does_not_fit_is_reported_together():
    case, data = golden.load("s3"), golden.stored("s3", "generate")
    prompt, negative = prompts(data)
    keys = jax.random.split(jax.random.key(0), 3)
    run = Sampler(Generation(case.config), case.pad_id, ())
    with pytest.raises(ValueError, match=r"passes is empty.*3 keys for 2.*\(2, 18\)"):
        run(case.params["params"], case.codebooks, prompt, negative[:, 1:], keys)
