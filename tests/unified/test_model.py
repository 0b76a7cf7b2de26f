"""The unified model: rows against each conversation alone, and against the two stages' goldens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recomputed_sampling
from golden import generation as golden

from tokenflow_jax.data.chat import insertion
from tokenflow_jax.data.chat.insertion import Drawn
from tokenflow_jax.data.chat.templates import DRAWN_ID, IGNORE, IMAGE_ID
from tokenflow_jax.generation.model import ROPES, Generation, next_scale_features
from tokenflow_jax.generation.sample import Sampler
from tokenflow_jax.nets import chunked_attention
from tokenflow_jax.nets.lm import Decoder, LMConfig, init_cache
from tokenflow_jax.tokenizer.quantizer import Codebooks
from tokenflow_jax.understanding.model import Understanding, UnderstandingConfig, visual_features
from tokenflow_jax.unified.model import Unified, UnifiedConfig

LM = LMConfig(vocabulary_size=56, width=16, layers=2, heads=2, kv_heads=1, mlp_width=24)
CONFIG = UnifiedConfig(LM, (1, 2, 3), 16, 36, code_channels=9, vision_channels=9)
MODEL = Unified(CONFIG)
CODES, VECTORS = CONFIG.pyramid.tokens, 9
DRAWN = Drawn(CODES, (30, 31), (32, 33, 34))


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init_params)(jax.random.key(0))


@pytest.fixture(scope="module")
def pictures():
    """Codes and features of three pictures."""
    rng = np.random.default_rng(0)
    books = Codebooks(*(jnp.asarray(rng.normal(size=(16, c)), jnp.float32) for c in (6, 3)))
    codes = jnp.asarray(rng.integers(0, 16, (3, CODES)))
    return {
        "codes": codes,
        "read": visual_features(codes, books, CONFIG.pyramid),
        "write": next_scale_features(codes, books, CONFIG),
    }


def conversation(number):
    """Read and answer; draw; draw, read and answer."""
    rng = np.random.default_rng(number)
    text = lambda count: rng.integers(1, 30, count).tolist()  # noqa: E731
    parts = (
        [*text(3), IMAGE_ID, *text(5)],
        [*text(4), DRAWN_ID, *text(1)],
        [*text(2), DRAWN_ID, IMAGE_ID, *text(6)],
    )[number]
    labels = [part if i > 1 else IGNORE for i, part in enumerate(parts)]
    return insertion.merge_row(np.array(parts), np.array(labels), VECTORS, drawn=DRAWN)


def row_of(numbers, padding=4):
    row = insertion.join_rows([conversation(n) for n in numbers], VECTORS, CODES)
    return insertion.pad_rows([row], len(row["ids"]) + padding)


def arrays(numbers, pictures, padding=4):
    """Arguments of `losses` for one row of these conversations."""
    row, own = row_of(numbers, padding), jnp.array(numbers)
    features = {name: pictures[name][own][None] for name in ("read", "write")}
    names = ("ids", "labels", "places", "segments")
    return [jnp.asarray(row[name]) for name in names], features, pictures["codes"][own][None]


def alone(params, number, pictures, config=CONFIG):
    """The logits of one conversation by a decoder without cache, its inputs and mask by loops."""
    row, p = conversation(number), jax.tree.map(np.asarray, params)
    level, position, embedding = (
        p["level_embedding"], p["position_embedding"], p["lm"]["embed"]["embedding"],
    )  # fmt: skip
    dense = lambda x, layer: x @ layer["kernel"] + layer["bias"]  # noqa: E731

    def project(name, x):
        hidden = jax.nn.gelu(dense(x, p[name]["fc1"]), approximate=False)
        return np.asarray(dense(hidden, p[name]["fc2"]))

    scale_of = np.repeat(np.arange(3), [1, 4, 9])
    places, length = row["places"], len(row["ids"])
    inputs, last = [], []
    for i, place in enumerate(places):
        code = -2 - place
        last.append(i)
        if place == -1:
            x = embedding[row["ids"][i]] + level[0]
            if i + 1 < length and places[i + 1] == -2:
                x = x + position[0]
        elif place >= 0:
            x = project("read_projector", pictures["read"][number][place]) + level[0]
        elif code == CODES - 1:
            x = level[0]
        else:
            x = project("write_projector", pictures["write"][number][code])
            x = x + level[scale_of[code + 1] + 1] + position[code + 1]
            ends = [j for j in range(CODES) if scale_of[j] == scale_of[code + 1]]
            last[i] = i + ends[-1] - (code + 1)
        inputs.append(x)
    allowed = np.array([[j <= last[i] for j in range(length)] for i in range(length)])[None]
    decoder = {"params": params["lm"]}
    xla = Decoder(dataclasses.replace(LM, attention="xla"))
    start = int(np.argmax(places == -2)) if -2 in places else length
    at = recomputed_sampling.positions(config, start, length)[None]
    hidden, _ = xla.apply(decoder, np.array(inputs)[None], at, allowed)
    return row, np.asarray(xla.apply(decoder, hidden, method="logits")[0])


@pytest.mark.parametrize("kernel, rope", [("xla", "1d"), ("chunked", "1d"), ("xla", "3d")])
def test_a_row_of_several_conversations_equals_each_alone(
    params, pictures, kernel, rope, monkeypatch
):
    (ids, _, places, segments), features, _ = arrays((2, 0, 1), pictures)
    if kernel == "chunked":
        monkeypatch.setattr(chunked_attention, "_QUERIES", 16)
    config = dataclasses.replace(CONFIG, rope=rope)
    apply = jax.jit(Unified(config).apply)
    hidden, _ = apply({"params": params}, ids, places, segments, features)
    logits = MODEL.apply({"params": params}, hidden, method=lambda m, x: m.lm.logits(x))
    text = MODEL.apply({"params": params}, hidden, method="logits")
    np.testing.assert_allclose(text, logits[..., :36], atol=1e-6)
    first = 0
    for number in (2, 0, 1):
        row, want = alone(params, number, pictures, config)
        np.testing.assert_allclose(logits[0, first : first + len(want)], want, atol=2e-5)
        first += len(row["ids"])


def per_token(params, args, **options):
    """Losses, right ones and labels, by a compiled program."""
    run = jax.jit(
        lambda p, a: MODEL.apply({"params": p}, *a[0], *a[1:], **options, method="losses")
    )
    return run(params, args)


@pytest.mark.parametrize("vocabulary", ["own", "all"])
def test_losses_compete_with_their_own_part(params, pictures, vocabulary):
    args = arrays((2, 0, 1), pictures)
    losses, right, labels = map(np.asarray, per_token(params, args, vocabulary=vocabulary))
    first = 0
    for number in (2, 0, 1):
        row, logits = alone(params, number, pictures)
        for i in range(len(row["ids"]) - 1):
            label, code = row["labels"][i + 1], -2 - row["places"][i + 1]
            if code >= 0:
                label = 36 + int(pictures["codes"][number, code])
            at = first + i
            if label < 0:
                assert labels[0, at] < 0 and losses[0, at] == 0
                continue
            part = slice(None)
            if vocabulary == "own":
                part = slice(0, 36) if code < 0 else slice(36, 52)
            scores = logits[i, part]
            want = jax.nn.logsumexp(scores) - logits[i, label]
            np.testing.assert_allclose(losses[0, at], want, atol=2e-5)
            assert labels[0, at] == label
            assert right[0, at] == (scores.max() == logits[i, label])
        first += len(row["ids"])
    assert (labels >= 36).sum() == 2 * CODES


def test_packing_changes_no_conversation(params, pictures):
    losses, _, labels = per_token(params, arrays((2, 0, 1), pictures))
    first = 0
    for number in (2, 0, 1):
        own, _, own_labels = per_token(params, arrays((number,), pictures, padding=0))
        where = slice(first, first + own.shape[1])
        np.testing.assert_allclose(losses[:, where], own, atol=2e-5)
        np.testing.assert_array_equal(labels[:, where] >= 0, own_labels >= 0)
        first += own.shape[1]


def test_gradients_do_not_reach_a_head_s_frozen_columns(params, pictures):
    args = arrays((2,), pictures)

    def total(params, learned_from):
        options = {"learned_from": learned_from, "method": "losses"}
        return MODEL.apply({"params": params}, *args[0], *args[1:], **options)[0].sum()

    whole, part = (jax.grad(total)(params, n)["lm"]["head"]["kernel"] for n in (0, 36))
    assert np.abs(whole[:, :36]).max() > 0 and not part[:, :36].any()
    np.testing.assert_allclose(part[:, 36:], whole[:, 36:], atol=1e-6)


@pytest.mark.parametrize("rope", ROPES)
def test_a_cache_is_read_as_whole_rows_are(params, pictures, rope):
    """A first part of a conversation, and then what follows, with a picture written there."""
    apply = Unified(dataclasses.replace(CONFIG, rope=rope)).apply
    (ids, _, places, segments), features, _ = arrays((2,), pictures, padding=0)
    want, _ = apply({"params": params}, ids, places, segments, features)
    variables, length = {"params": params}, ids.shape[1]
    whole = init_cache(LM, 1, length + 3)
    got, _ = apply(variables, ids, places, segments, features, whole)
    np.testing.assert_allclose(got, want, atol=2e-5)
    cache, parts = init_cache(LM, 1, length + 3), []
    for part in (slice(0, 2), slice(2, 2 + 2 + CODES + 3), slice(7 + CODES, length)):
        row = (ids[:, part], places[:, part], segments[:, part])
        hidden, cache = apply(variables, *row, features, cache, method="read_on")
        parts.append(hidden)
    np.testing.assert_allclose(np.concatenate(parts, 1), want, atol=2e-5)


@pytest.mark.parametrize("option", [{}, {"rope": "3d"}, {"scale_inputs": "residual"}])
def test_a_sampler_draws_what_whole_rows_predict(params, option):
    """Greedy codes, scale by scale with a cache, rank first in the row that training would see."""
    config = dataclasses.replace(CONFIG, **option)
    model = Unified(config)
    params = jax.tree.map(lambda x: 9 * x, params)  # attention is far from even
    rng = np.random.default_rng(1)
    books = Codebooks(*(jnp.asarray(rng.normal(size=(16, c)), jnp.float32) for c in (6, 3)))
    requests = [[3, 5], [3, 6, 7, 8]]
    ids = np.array([[*[0] * (4 - len(text)), *text, *DRAWN.open_ids] for text in requests])
    sampler = Sampler(model, 0, ((1, 0.0),))
    codes = jax.jit(sampler)(params, books, ids, None, jax.random.split(jax.random.key(0), 2), 0.0)
    for text, codes_N in zip(requests, codes, strict=True):
        row = insertion.merge_row(np.array([*text, DRAWN_ID]), None, VECTORS, drawn=DRAWN)
        batch = insertion.pad_rows([row], len(row["ids"]))
        rows = (batch["ids"], batch["places"], batch["segments"])
        features = {
            "read": visual_features(codes_N[None], books, CONFIG.pyramid)[None],
            "write": next_scale_features(codes_N[None], books, config)[None],
        }
        hidden, _ = model.apply({"params": params}, *rows, features)
        logits = model.apply({"params": params}, hidden, method="code_logits")[0]
        first = int(np.flatnonzero(row["places"] == -2)[0]) - 1
        np.testing.assert_array_equal(logits[first : first + CODES].argmax(-1), codes_N)


def test_reading_alone_it_is_the_understanding_model(params, pictures):
    """Losses and gradients of equal weights, whose first level is zero as `init_from` makes it."""
    config = UnderstandingConfig(dataclasses.replace(LM, vocabulary_size=36), 9)
    lm, codes = params["lm"], pictures["codes"][:1][None]
    theirs = {
        "projector": params["read_projector"],
        "lm": lm
        | {"embed": {"embedding": lm["embed"]["embedding"][:36]}}
        | {"head": {"kernel": lm["head"]["kernel"][:, :36]}},
    }
    ours = params | {"level_embedding": params["level_embedding"].at[0].set(0)}
    (ids, labels, places, segments), features, _ = arrays((0,), pictures)

    def unified(params):
        read = {"read": features["read"]}  # nothing is written: causal masks, kernels as there
        rows = (ids, labels, places, segments, read, codes)
        losses, right, _ = MODEL.apply({"params": params}, *rows, method="losses")
        return losses.sum(), right.sum()

    def understanding(params):
        rows = (ids, labels, places, segments, features["read"])
        sums = Understanding(config).apply({"params": params}, *rows, method="loss")
        return sums["loss"], sums["right"]

    graded = (jax.value_and_grad(f, has_aux=True) for f in (unified, understanding))
    (got, gradients), (want, wanted) = (g(p) for g, p in zip(graded, (ours, theirs), strict=True))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for name in ("fc1", "fc2"):
        mine, other = gradients["read_projector"][name], wanted["projector"][name]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), mine, other)


@pytest.mark.parametrize("name", ["s3", "s4"])
def test_writing_alone_it_is_the_generation_model(name):
    """The golden batches of that stage, without their padding: losses of codes and suffix."""
    case, data = golden.load(name), golden.stored(name, "train")
    config = UnifiedConfig(**vars(case.config), vision_channels=4)
    codes = jnp.asarray(data["codes"])
    count, start = codes.shape[1], data["input_ids"].shape[1] - codes.shape[1] - 4
    features = next_scale_features(codes, case.codebooks, config)
    template = jax.eval_shape(Unified(config).init_params, jax.random.key(0))
    params = dict(case.params["params"])
    params["write_projector"] = params.pop("projector")
    zeros = lambda x: jnp.zeros(x.shape, x.dtype)  # noqa: E731
    params["read_projector"] = jax.tree.map(zeros, template["read_projector"])
    prefix, suffix = data["input_ids"][:, :start], data["input_ids"][:, -4:]
    real = prefix != case.pad_id
    run = jax.jit(lambda p, *a: Generation(case.config).apply(p, *a, text=True, method="losses"))
    theirs = run(case.params, prefix, real, codes, features, suffix)
    options = {"vocabulary": "all", "method": "losses"}
    ours = jax.jit(lambda p, *a: Unified(config).apply({"params": p}, *a, **options))
    for i in range(len(codes)):
        ids = np.concatenate([prefix[i][real[i]], [DRAWN_ID], suffix[i]])
        row = insertion.merge_row(ids, ids, 1, drawn=Drawn(count))
        length = len(row["ids"])
        batch = insertion.pad_rows([row], start + count + 4)
        rows = [batch[key] for key in ("ids", "labels", "places", "segments")]
        both = {"read": jnp.zeros((1, 1, 1, 4)), "write": features[i : i + 1][None]}
        got, right, _ = ours(params, *rows, both, codes[i : i + 1][None])
        first = real[i].sum() - 1
        np.testing.assert_allclose(got[0, first : length - 1], theirs.image[i], atol=5e-5)
        np.testing.assert_array_equal(right[0, first : length - 1], theirs.image_right[i])
        np.testing.assert_allclose(got[0, :first], theirs.text[i, -first:], atol=5e-5)
    if name == "s4":
        stored = np.float32(data["loss_vision"])
        np.testing.assert_allclose(theirs.image.mean(), stored, atol=1e-5)


def test_a_config_reports_its_own_fields():
    with pytest.raises(ValueError, match="unified model: strategy 'first'"):
        dataclasses.replace(CONFIG, strategy="first")
    with pytest.raises(ValueError, match=r"unified model: .*begin with 1"):
        dataclasses.replace(CONFIG, scales=(2, 3))
