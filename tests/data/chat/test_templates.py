"""Templates: the reference's texts, ids and loss spans."""

import json
import pathlib

import numpy as np
import pytest
from byte_text_tokenizers import LLAMA_LIKE, QWEN_LIKE, golden_tokenizer

from tokenflow_jax.data import built_in_text
from tokenflow_jax.data.chat import templates
from tokenflow_jax.data.chat.templates import GPT, HUMAN, IGNORE, IMAGE_ID

GOLDEN = json.loads(
    (pathlib.Path(__file__).parents[2] / "golden" / "i2t_conversations.json").read_text()
)
TRAINING, INFERENCE = GOLDEN["training"], GOLDEN["inference"]


def turns_of(rows):
    return [(row["from"], row["value"]) for row in rows]


@pytest.mark.parametrize("case", TRAINING, ids=lambda c: f"{c['template']}-{c['sample']}")
def test_training(case):
    """Marker handling, the text, ids and labels, with each of the trivial tokenizers."""
    turns = templates.prepare_turns(turns_of(case["conversations"]), case["has_image"])
    want = turns_of(case["after_multimodal"])
    assert turns == (want if want[0][0] == HUMAN else want[1:])
    template = templates.get_template(case["template"])
    assert template.prompt(turns) == case["prompt"]
    tried = 0
    for name, want in case["tokenised"].items():
        if not name.startswith("bytes"):
            continue
        tokens = template.tokenize(golden_tokenizer(name, case["template"]), turns)
        assert tokens.ids_L.tolist() == want["input_ids"]
        learned = np.zeros(len(tokens.ids_L), bool)
        for start, stop in want["loss_token_spans"]:
            learned[start:stop] = True
        assert tokens.labels_L.tolist() == np.where(learned, tokens.ids_L, IGNORE).tolist()
        tried += 1
    assert tried


@pytest.mark.parametrize(
    "case", [c for c in INFERENCE if c["template"] in templates.TEMPLATES],
    ids=lambda c: f"{c['template']}-{len(c.get('turns', ''))}",
)  # fmt: skip
def test_inference(case):
    template = templates.get_template(case["template"])
    if "turns" in case:
        roles = (HUMAN, GPT)
        turns = [(roles[i % 2], t) for i, t in enumerate(case["turns"]) if t is not None]
    else:
        turns = [(HUMAN, case["question"])]
    assert template.prompt(turns) == case["prompt"]
    for name, ids in case.get("input_ids", {}).items():
        if name == "bytes":
            # In these cases the start-prefixed tokenizer stands for all templates.
            assert template.prompt_ids(LLAMA_LIKE, turns).tolist() == ids
        elif name == "bytes_no_bos":
            assert template.prompt_ids(QWEN_LIKE, turns).tolist() == ids


def test_an_answer_s_header_in_a_question_costs_all_labels():
    turns = [(HUMAN, "Say: ASSISTANT: yes"), (GPT, "no")]
    tokens = templates.get_template("vicuna_v1").tokenize(LLAMA_LIKE, turns)
    assert (tokens.labels_L == IGNORE).all()
    assert (templates.get_template("qwen_2_5").tokenize(QWEN_LIKE, turns).labels_L != IGNORE).any()


@pytest.mark.parametrize("name", ["vicuna_v1", "llama_2"])
def test_the_byte_tokenizer_learns_answers_and_their_end(name):
    """Its text has no special tokens: the template puts them there."""
    tokenizer = built_in_text.ByteTokenizer()
    turns = [(HUMAN, "<image>\nWhat?"), (GPT, "A cät."), (HUMAN, "Sure?"), (GPT, "Yes.")]
    tokens = templates.get_template(name, system="").tokenize(tokenizer, turns)
    assert (tokens.ids_L == IMAGE_ID).sum() == 1
    learned = tokens.ids_L[tokens.labels_L != IGNORE]
    assert learned.tolist().count(tokenizer.eos_token_id) == 2
    assert tokenizer.decode(learned, skip_special_tokens=True).split() == ["A", "cät.", "Yes."]
    assert templates.get_template(name).stop_ids(tokenizer) == (tokenizer.eos_token_id,)


@pytest.mark.parametrize("roles", [(), (HUMAN,), (GPT, HUMAN), (HUMAN, HUMAN, GPT, GPT)])
def test_bad_order(roles):
    with pytest.raises(ValueError, match="must alternate"):
        templates.get_template("vicuna_v1").tokenize(LLAMA_LIKE, [(r, "x") for r in roles])


def test_plain_needs_an_image():
    with pytest.raises(ValueError, match="<image>"):
        templates.get_template("plain").tokenize(LLAMA_LIKE, [(HUMAN, "x"), (GPT, "y")])


def test_markers():
    prepare = templates.prepare_turns
    assert prepare([(HUMAN, " a <image> b <image>"), (GPT, "c")], True)[0][1] == "<image>\na  b"
    assert prepare([(HUMAN, "<image>"), (GPT, "c")], True)[0][1] == "<image>"
    assert prepare([(HUMAN, "a <image>"), (GPT, "c")], False)[0][1] == "a <image>"


def test_an_unknown_template():
    with pytest.raises(ValueError, match="vicuna_v1"):
        templates.get_template("vicuna")
