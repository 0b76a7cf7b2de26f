"""The understanding model: the reference's logits, gradients and answers; input strategies."""

import dataclasses
import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_states

from tokenflow_jax.data.chat import insertion
from tokenflow_jax.tokenizer.pyramid import Scales
from tokenflow_jax.tokenizer.quantizer import Codebooks
from tokenflow_jax.understanding import model as understanding
from tokenflow_jax.understanding.answer import Decoding, answer, start, step
from tokenflow_jax.understanding.model import Understanding, UnderstandingConfig
from tokenflow_jax.understanding.names import understanding_table, understanding_template
from tokenflow_jax.weights import language_model, rules

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
WEIGHTS = runpy.run_path(str(GOLDEN / "weights.py"))
KINDS = ("qwen", "llama")


def load(kind, name):
    with np.load(GOLDEN / f"i2t_{kind}.{name}.npz") as file:
        return {key: file[key] for key in file.files}


def model_of(kind):
    info = json.loads((GOLDEN / f"i2t_{kind}.config.json").read_text())
    fields = info["llm"] | {"model_type": "qwen2" if kind == "qwen" else "llama"}
    lm = language_model.config_from_json(fields | {"head_dim": info["head_dim"]})
    config = UnderstandingConfig(lm, info["mm_hidden_size"], info["mm_projector"])
    shapes = json.loads((GOLDEN / f"i2t_{kind}.manifest.json").read_text())
    state = WEIGHTS["state_dict"](shapes, seed=info["seed"])
    table, template = understanding_table(config), understanding_template(config)
    return Understanding(config), rules.to_flax(state, table, template), info["pad_token_id"]


def batch_of(ids_BT, mask_BT, labels_BT, features_INC, *, side="right", images=None):
    """Rows of tokens with their images, in the form of the reference."""
    rows, vectors = [], features_INC.shape[1]
    labels_BT = [None] * len(ids_BT) if labels_BT is None else labels_BT
    for ids, mask, labels in zip(ids_BT, mask_BT.astype(bool), labels_BT, strict=True):
        labels = None if labels is None else labels[mask]
        rows.append(insertion.merge_row(ids[mask], labels, vectors))
    if images is None:
        counts = [max(1, int((ids == -200).sum())) for ids in ids_BT]  # none uses up one, unread
        stops = np.cumsum(counts)
        images = [range(stop - n, stop) for stop, n in zip(stops, counts, strict=True)]
    batch = insertion.pad_rows(rows, max(len(row["ids"]) for row in rows), side)
    most = max(map(len, images))
    features = np.zeros((len(rows), most, *features_INC.shape[1:]), np.float32)
    for i, own in enumerate(images):
        features[i, : len(own)] = features_INC[list(own)]
    return {**batch, "features": features}


def inputs(batch):
    return (batch["ids"], batch["places"], batch["segments"], batch["features"])


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    return request.param, *model_of(request.param), load(request.param, "forward")


def test_forward(case):
    """Embeddings, hidden states, logits and loss of three samples: one image, none, two."""
    _, model, params, _, want = case
    batch = batch_of(
        want["input_ids"], want["attention_mask"], want["labels"], want["image_features"]
    )
    variables, real = {"params": params}, batch["segments"] > 0
    np.testing.assert_array_equal(batch["labels"], want["merged_labels"])
    embedded = model.apply(variables, *inputs(batch), method="embed")
    np.testing.assert_allclose(embedded, want["inputs_embeds"], atol=1e-5)
    hidden, _ = model.apply(variables, *inputs(batch))
    np.testing.assert_allclose(hidden[real][:, ::4], want["last_hidden"][real], atol=5e-5)
    logits = model.apply(variables, hidden, method="logits")
    lse = jax.nn.logsumexp(logits, -1)
    np.testing.assert_allclose(
        logits[..., want["logit_ids"]][real], want["logits"][real], atol=5e-5
    )
    np.testing.assert_allclose(lse[real], want["logits_lse"][real], atol=5e-5)
    np.testing.assert_array_equal(logits.argmax(-1)[real], want["argmax"][real])
    with_labels = (batch["ids"], batch["labels"], *inputs(batch)[1:])
    out = model.apply(variables, *with_labels, method="loss")
    np.testing.assert_allclose(out["loss"] / out["labels"], want["loss"], atol=1e-5)
    assert out["labels"] == (want["merged_labels"][:, 1:] >= 0).sum()
    right = (want["argmax"][:, :-1] == want["merged_labels"][:, 1:]).sum()
    assert out["right"] == right


def test_gradients(case):
    _, model, params, _, want = case
    batch = batch_of(
        want["input_ids"], want["attention_mask"], want["labels"], want["image_features"]
    )

    def loss(params):
        out = model.apply(
            {"params": params}, batch["ids"], batch["labels"], *inputs(batch)[1:], method="loss"
        )
        return out["loss"] / out["labels"]

    gradients = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params))
    state = torch_states.to_torch(gradients, understanding_table(model.config))
    names = want["grad_param_names"].tolist()
    assert sorted(names) == sorted(state)
    norms = [np.linalg.norm(state[name]) for name in names]
    np.testing.assert_allclose(norms, want["grad_norms"], rtol=1e-4)
    for key, value in want.items():
        if key.startswith("grad:"):
            np.testing.assert_allclose(state[key[5:]], value, atol=1e-5)


def test_conversations_that_share_a_row(case):
    """Hidden states, loss and gradients are those of rows of their own."""
    _, model, params, _, want = case
    ids_BT, mask_BT, labels_BT = (want[k] for k in ("input_ids", "attention_mask", "labels"))
    features = want["image_features"]  # the first row has one image, the second uses up one
    apart = batch_of(ids_BT[:2], mask_BT[:2], labels_BT[:2], features)
    rows = [
        insertion.merge_row(ids[mask], labels[mask], features.shape[1])
        for ids, mask, labels in zip(ids_BT[:2], mask_BT[:2].astype(bool), labels_BT, strict=False)
    ]
    joint = insertion.join_rows([rows[1], {}, rows[0]], features.shape[1])
    shared = insertion.pad_rows([joint], len(joint["ids"]) + 3)
    shared["features"] = np.stack([features[1], features[1] * 0, features[0]])[None]

    def hidden(batch):
        return model.apply({"params": params}, *inputs(batch))[0][batch["segments"] > 0]

    first = int(apart["segments"][0].sum())
    expected = hidden(apart)
    expected = np.concatenate([expected[first:], expected[:first]])
    np.testing.assert_allclose(hidden(shared), expected, atol=5e-5)

    def loss(params, batch):
        args = (batch["ids"], batch["labels"], *inputs(batch)[1:])
        out = model.apply({"params": params}, *args, method="loss")
        return out["loss"], out

    graded = jax.jit(jax.grad(loss, has_aux=True))
    (got, sums), (gradients, expected) = graded(params, shared), graded(params, apart)
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(b).max(), 1)),
        got, gradients,
    )  # fmt: skip


def test_a_list_of_images_at_one_marker(case):
    _, model, params, _, want = case
    counts, features = want["list:images_per_sample"].tolist(), want["image_features"]
    images, first = [], 0
    for count in counts:
        images.append(range(first, first + count))
        first += count
    ids, labels = want["list:input_ids"], want["list:labels"]
    lengths = want["list:merged_attention_mask"].sum(1)
    rows = []
    for i in range(3):
        markers = int((ids[i] == -200).sum())
        per_marker = [features.shape[1] * counts[i]] * markers
        real = lengths[i] - sum(per_marker) + markers
        rows.append(insertion.merge_row(ids[i, :real], labels[i, :real], per_marker))
    batch = insertion.pad_rows(rows, want["list:merged_labels"].shape[1])
    stacked = np.zeros((3, max(counts), *features.shape[1:]), np.float32)
    for i, own in enumerate(images):
        stacked[i, : len(own)] = features[list(own)]
    embedded = model.apply(
        {"params": params}, *inputs({**batch, "features": stacked}), method="embed"
    )
    probe = want["list:inputs_embeds_probe"]
    step_size = embedded.shape[-1] // probe.shape[-1]
    np.testing.assert_allclose(embedded[..., ::step_size], probe, atol=1e-5)


def test_text_alone(case):
    """Without any picture in the batch."""
    _, model, params, _, want = case
    mask = want["attention_mask"][1:2]
    none = np.zeros((1, 1, 40), np.float32)
    batch = batch_of(want["input_ids"][1:2], mask, want["labels"][1:2], none, images=[range(1)])
    out = model.apply(
        {"params": params}, batch["ids"], batch["labels"], *inputs(batch)[1:], method="loss"
    )
    np.testing.assert_allclose(
        out["loss"] / out["labels"], want["text_only_no_images_loss"], atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_of_729_vectors(kind):
    model, params, _ = model_of(kind)
    want = load(kind, "grid27")
    mask = np.ones_like(want["input_ids"], bool)
    batch = batch_of(want["input_ids"], mask, want["labels"], want["image_features"])
    hidden, _ = model.apply({"params": params}, *inputs(batch))
    logits = model.apply({"params": params}, hidden, method="logits")
    np.testing.assert_allclose(logits[:, -15:], want["tail_logits"], atol=5e-5)
    np.testing.assert_allclose(jax.nn.logsumexp(logits, -1), want["logits_lse"], atol=5e-5)
    out = model.apply(
        {"params": params}, batch["ids"], batch["labels"], *inputs(batch)[1:], method="loss"
    )
    np.testing.assert_allclose(out["loss"] / out["labels"], want["loss"], atol=1e-5)


CALLS = {
    "single": [[0]], "two_images": [[2, 3]], "text_only": [[0]], "batch_left": [[0], [2, 3]],
    "eos": [[0], [2, 3]],
}  # fmt: skip
# Batches have all that the single calls have; those are left to the slow tests.
QUICK = {("qwen", "batch_left"), ("qwen", "text_only"), ("llama", "eos")}


@pytest.mark.parametrize(
    "kind, call",
    [
        pytest.param(k, c, marks=[] if (k, c) in QUICK else [pytest.mark.slow])
        for k in KINDS
        for c in CALLS
    ],
)
def test_greedy_answers(kind, call):
    """The ids, and the scores, token by token with a cache."""
    model, params, pad = model_of(kind)
    want = load(kind, "generate")
    features, new = want["image_features"], want[f"{call}:new_ids"]
    prompt = batch_of(
        want[f"{call}:input_ids"], want[f"{call}:attention_mask"], None, features, side="left",
        images=CALLS[call],
    )  # fmt: skip
    stops = (int(want["eos:eos_token_id"]),) if call == "eos" else ()
    decoding = Decoding(new.shape[1], stops, pad)
    key = jax.random.key(0)
    got = jax.jit(lambda p, q: answer(model, p, q, key, decoding))(params, prompt)
    np.testing.assert_array_equal(got, new)

    one_more = jax.jit(lambda p, s: step(model, p, s, decoding))
    state = jax.jit(lambda p, q: start(model, p, q, key, decoding))(params, prompt)
    live = want[f"{call}:live"]
    for i in range(new.shape[1]):
        scores = want[f"{call}:scores"][:, i]
        np.testing.assert_allclose(state.logits_BV[live[:, i]], scores[live[:, i]], atol=5e-5)
        state = one_more(params, state)
    np.testing.assert_array_equal(state.ids_BN, new)


def test_answers_stop_early_and_rows_do_not_depend_on_others():
    model, params, pad = model_of("qwen")
    want = load("qwen", "generate")
    args = (want["batch_left:input_ids"], want["batch_left:attention_mask"], None)
    prompt = batch_of(*args, want["image_features"], side="left", images=CALLS["batch_left"])
    sampled = Decoding(8, (), pad, temperature=1.0, top_k=20, top_p=0.9)
    run = jax.jit(lambda q, key: answer(model, params, q, key, sampled))
    first = run(prompt, jax.random.key(1))
    np.testing.assert_array_equal(first, run(prompt, jax.random.key(1)))
    assert (first != run(prompt, jax.random.key(2))).any()
    alone = {name: array[:1] for name, array in prompt.items()}
    np.testing.assert_array_equal(run(alone, jax.random.key(1)), first[:1])
    # A stop id is the row's last; padding behind it.
    stop = int(first[0, 2])
    ended = answer(
        model, params, prompt, jax.random.key(1), dataclasses.replace(sampled, stop_ids=(stop,))
    )
    where = np.asarray(first[0]).tolist().index(stop)
    assert ended[0, where] == stop and (ended[0, where + 1 :] == pad).all()


@pytest.fixture(scope="module")
def codes():
    rng = np.random.default_rng(0)
    books = Codebooks(*(jnp.asarray(rng.normal(size=(16, c)), jnp.float32) for c in (6, 3)))
    scales = Scales((1, 2, 4))
    return jnp.asarray(rng.integers(0, 16, (2, scales.tokens))), books, scales


@pytest.mark.parametrize("strategy", understanding.STRATEGIES)
def test_strategies_have_the_stated_shapes(codes, strategy):
    features = understanding.visual_features(*codes, strategy)
    count = understanding.vectors_per_image(codes[2], strategy)
    channels = understanding.feature_channels(6, 3, strategy)
    assert features.shape == (2, count, channels) and features.dtype == jnp.float32


def test_strategies_agree_where_they_must(codes):
    """The last scale of the growing maps is the quantized map; halves are its halves."""
    of = lambda strategy: understanding.visual_features(*codes, strategy)  # noqa: E731
    last, full, residual = of("last_scale"), of("full_scale"), of("residual")
    np.testing.assert_allclose(full[:, 5:], last, atol=1e-6)
    np.testing.assert_allclose(full[:, 0], residual[:, 0], atol=1e-6)
    assert np.abs(full[:, 1:5] - residual[:, 1:5]).max() > 0.1
    halves = [of("last_scale_semantic"), of("last_scale_pixel")]
    np.testing.assert_array_equal(np.concatenate(halves, -1), last)
    norms = np.linalg.norm(residual[..., :6], axis=-1)
    np.testing.assert_allclose(norms, 1, atol=1e-5)


def test_a_linear_projector_goes_both_ways():
    config = dataclasses.replace(model_of("qwen")[0].config, projector="linear")
    shapes = understanding_template(config)
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    state = torch_states.to_torch(params, understanding_table(config))
    assert state["model.mm_projector.weight"].shape == (64, 40)
    back = rules.to_flax(state, understanding_table(config), shapes)
    assert jax.tree.structure(back) == jax.tree.structure(params)


def test_a_config_reports_every_problem():
    lm = model_of("qwen")[0].config.lm
    with pytest.raises(ValueError, match=r"projector.*strategy.*vision_channels"):
        UnderstandingConfig(lm, 0, "mlp3x", "first_scale")
    with pytest.raises(ValueError, match=r"max_new.*temperature.*top_k"):
        Decoding(0, temperature=-1, top_k=-1)
