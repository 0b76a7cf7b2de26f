"""Sampling: the reference's codes and logits in every setting, with the cache and without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import generation as golden

from tokenflow_jax.generation import sample as generate
from tokenflow_jax.generation.model import Generation
from tokenflow_jax.generation.sample import Prompt


def prompts(case, data):
    ids = jnp.asarray(data["prefix_ids"], jnp.int32)
    real = ids != case.pad_id
    half = len(ids) // 2
    return Prompt(ids[:half], real[:half]), Prompt(ids[half:], real[half:])


@functools.cache
def sampler(name, passes, method):
    """The compiled program; all passes greedy, as the stored results."""
    case = golden.load(name)
    greedy = ((1, 0.0),) * passes
    return jax.jit(
        functools.partial(
            generate.sample_traced, Generation(case.config), passes=greedy, method=method
        )
    )


QUICK = (("s3", 1, "cache"), ("s4", 3, "cache"))
SETTINGS = [
    pytest.param(*setting, marks=[] if setting in QUICK else [pytest.mark.slow])
    for setting in (
        *((name, passes, "cache") for name in ("s3", "s4", "s9") for passes in (1, 2, 3)),
        ("s3", 3, "whole"),
        ("s4", 2, "so_far"),
        ("s9", 1, "whole"),
    )
]


@pytest.mark.parametrize("name, passes, method", SETTINGS)
def test_equals_the_reference(name, passes, method):
    """Codes, the code of every pass, and guided logits; guidance 7.5 and 0 in one program."""
    case, data = golden.load(name), golden.stored(name, "generate")
    run = sampler(name, passes, method)
    keys = jax.random.split(jax.random.key(0), 2)
    watched = jnp.asarray(data[f"steps{passes}_cfg7p5:probe_ids"]) - case.config.image_start
    for key, guidance in (("7p5", 7.5), ("0", 0.0)):
        start = f"steps{passes}_cfg{key}:"
        codes, draws = run(
            case.params, case.codebooks, *prompts(case, data), keys, guidance, watched=watched
        )
        np.testing.assert_array_equal(codes, data[start + "codes"])
        order = [[draw.scale, draw.index] for draw in draws]
        np.testing.assert_array_equal(order, data[start + "call_scale_loop"])
        every = np.concatenate([draw.codes_BL for draw in draws], axis=1)
        np.testing.assert_array_equal(every, data[start + "argmax"])
        want = data.get(start + "probe_logits")
        assert want is not None or guidance == 0
        if want is not None:
            got = np.concatenate([draw.logits_BLn for draw in draws], axis=1)
            np.testing.assert_allclose(got, want, atol=2e-4, rtol=0)
    assert run._cache_size() == 1  # one program, whatever the guidance


def test_without_a_negative_prompt_equals_no_guidance():
    case, data = golden.load("s4"), golden.stored("s4", "generate")
    prompt, _ = prompts(case, data)
    keys = jax.random.split(jax.random.key(0), 2)
    run = functools.partial(generate.sample, Generation(case.config), passes=((1, 0.0),))
    codes = jax.jit(run)(case.params, case.codebooks, prompt, None, keys)
    np.testing.assert_array_equal(codes, data["steps1_cfg0:codes"])


@pytest.mark.slow
def test_one_negative_prompt_serves_all():
    case, data = golden.load("s4"), golden.stored("s4", "generate")
    prompt, negative = prompts(case, data)
    single = Prompt(*(x[:1] for x in negative))
    run = functools.partial(generate.sample, Generation(case.config), passes=((1, 0.0),))
    keys = jax.random.split(jax.random.key(0), 2)
    codes = jax.jit(run)(case.params, case.codebooks, prompt, single, keys, 7.5)
    np.testing.assert_array_equal(codes, data["steps1_cfg7p5:codes"])


def test_rows_are_independent():
    """Random draws: equal seeds give equal images, in any batch; other seeds give others."""
    case, data = golden.load("s3"), golden.stored("s3", "generate")
    prompt, negative = prompts(case, data)
    run = jax.jit(functools.partial(generate.sample, Generation(case.config), passes=((100, 0.9),)))
    keys = jax.random.split(jax.random.key(5), 2)
    single = Prompt(*(x[:1] for x in negative))  # both rows of `negative` are the same
    both = run(case.params, case.codebooks, prompt, single, keys)
    second = Prompt(*(x[1:] for x in prompt))
    alone = run(case.params, case.codebooks, second, single, keys[1:])
    np.testing.assert_array_equal(alone[0], both[1])
    others = jax.random.split(jax.random.key(6), 2)
    assert (run(case.params, case.codebooks, prompt, single, others) != both).any()
    assert int(both.max()) < case.config.codebook_size


@pytest.mark.slow
def test_prefixes_of_another_length_are_another_bucket():
    """More padding in front changes nothing but the program."""
    case, data = golden.load("s4"), golden.stored("s4", "generate")
    both = prompts(case, data)
    longer = [
        Prompt(
            jnp.pad(ids, ((0, 0), (5, 0)), constant_values=case.pad_id),
            jnp.pad(real, ((0, 0), (5, 0))),
        )
        for ids, real in both
    ]
    run = jax.jit(functools.partial(generate.sample, Generation(case.config), passes=((1, 0.0),)))
    keys = jax.random.split(jax.random.key(0), 2)
    codes = run(case.params, case.codebooks, *longer, keys, 7.5)
    np.testing.assert_array_equal(codes, data["steps1_cfg7p5:codes"])


def test_what_does_not_fit_is_said_at_once():
    case, data = golden.load("s3"), golden.stored("s3", "generate")
    prompt, negative = prompts(case, data)
    wrong = Prompt(*(x[:, 1:] for x in negative))
    keys = jax.random.split(jax.random.key(0), 3)
    with pytest.raises(
        ValueError, match=r"method 'quick'.*passes is empty.*3 keys for 2.*\(2, 18\)"
    ):
        generate.sample(
            Generation(case.config),
            case.params,
            case.codebooks,
            prompt,
            wrong,
            keys,
            passes=(),
            method="quick",
        )
