"""Conversations in which pictures are drawn: their rows, sources, dropped requests and prefixes."""

import dataclasses
import json
import re

import numpy as np
import pytest
from picture_files import encode, picture

from tokenflow_jax.data import sources
from tokenflow_jax.data.built_in_text import CLOSE, OPEN, ByteTokenizer
from tokenflow_jax.data.chat import batches, conversations, drawing, insertion, templates
from tokenflow_jax.data.chat.emoji import KIND_QUESTION, NAME_QUESTION
from tokenflow_jax.data.chat.insertion import Drawn
from tokenflow_jax.data.chat.mixed import MixedConversations
from tokenflow_jax.data.chat.opened import ConversationConfig, Conversations
from tokenflow_jax.data.chat.templates import GPT, HUMAN, IGNORE, IMAGE, TEMPLATES, get_template
from tokenflow_jax.data.examples import Broken

TEXT = ByteTokenizer()
MARKS = [TEXT.encode(mark, add_special_tokens=False) for mark in (OPEN, CLOSE)]
DRAWN = Drawn(5, *MARKS)
VECTORS = 4
DRAW = ((HUMAN, "a cat"), (GPT, IMAGE))
CYCLE = (*DRAW, (HUMAN, "What?"), (GPT, "A cat."))


def prepared(turns, template="vicuna_v1", max_length=500, drawn=DRAWN):
    sample = conversations.Sample(turns, "a.png", True)
    how = get_template(template, ""), TEXT, VECTORS, max_length, drawn
    return conversations.prepare(sample, *how)


def shown(row):
    """The row as text, "[v]" for a vector that is read and "[c]" for a code."""
    parts = []
    for token, place in zip(row["ids"], row["places"], strict=True):
        parts.append(
            TEXT.decode([token]) if place == -1 else f"[v{place}]" if place >= 0 else f"[c{-place}]"
        )
    return "".join(parts)


@pytest.mark.parametrize("template", ["vicuna_v1", "qwen_2_5", "llama_2"])
def test_a_drawn_picture_has_loss_and_is_shown_to_what_follows(template):
    codes, vectors = "[c2][c3][c4][c5][c6]", "[v0][v1][v2][v3]"
    alone = prepared(DRAW, template)
    assert f"<img>{codes}</img>" in shown(alone) and vectors not in shown(alone)
    row = prepared(CYCLE, template)
    assert f"<img>{codes}</img>{vectors}" in shown(row) and shown(row).count("[c") == 5
    learned = TEXT.decode(row["ids"][row["labels"] != IGNORE])
    assert f"{OPEN}{CLOSE}" in learned and "A cat." in learned and "a cat" not in learned
    assert (row["labels"][row["places"] != -1] == IGNORE).all()


def test_only_the_coarse_scales_of_a_drawn_picture_train():
    coarse = DRAWN._replace(trained=1)
    whole, row = (prepared(CYCLE, drawn=drawn) for drawn in (DRAWN, coarse))
    assert "<img>[c2][v0][v1][v2][v3]" in shown(row)
    assert shown(row) == shown(whole).replace("[c3][c4][c5][c6]</img>", "")
    # Codes of a row's later pictures are numbered as if all were there.
    joined = insertion.join_rows([prepared(DRAW, drawn=coarse)] * 2, VECTORS, coarse.codes)
    assert [place for place in joined["places"] if place < -1] == [-2, -7]
    prepared(DRAW, max_length=30, drawn=coarse)
    with pytest.raises(Broken, match="its 1 codes end after 29 tokens"):
        prepared(DRAW, max_length=29, drawn=coarse)


def test_text_stands_around_a_drawn_picture():
    row = prepared(((HUMAN, "a cat"), (GPT, f"Here: {IMAGE} a tabby")))
    assert "Here: <img>[c2]" in shown(row) and "</img>[v0][v1][v2][v3] a tabby" in shown(row)


@pytest.mark.parametrize(
    "turns, options, reason",
    [
        ((*DRAW, *DRAW), {}, "several markers"),
        (((HUMAN, "x"), (GPT, IMAGE * 2)), {}, "several markers"),
        (((HUMAN, f"{IMAGE} x"), (GPT, IMAGE)), {}, "several markers"),
        (DRAW, {"max_length": 31}, "picture beyond the end"),
    ],
)
def test_what_has_no_place_is_left_out(turns, options, reason):
    with pytest.raises(Broken) as error:
        prepared(turns, **options)
    assert error.value.reason == reason


def test_the_mark_of_a_drawn_picture_is_no_text():
    row = prepared(((HUMAN, f"a {templates.DRAWN}cat"), (GPT, f"{templates.DRAWN}{IMAGE}")))
    assert shown(row) == shown(prepared(DRAW))


def test_a_model_that_reads_takes_markers_in_answers_as_before():
    sample = conversations.Sample(DRAW, "a.png", True)
    row = conversations.prepare(sample, get_template("vicuna_v1"), TEXT, VECTORS, 500)
    assert (row["places"] >= 0).sum() == VECTORS and row["places"].min() == -1


def test_rows_number_codes_and_vectors_of_each_image():
    row = insertion.join_rows([prepared(DRAW), {}, prepared(CYCLE)], VECTORS, DRAWN.codes)
    codes = row["places"][row["places"] < -1]
    np.testing.assert_array_equal(-2 - codes, [0, 1, 2, 3, 4, 10, 11, 12, 13, 14])
    np.testing.assert_array_equal(row["places"][row["places"] >= 0], [8, 9, 10, 11])


def of_emoji(**changes):
    options = {"questions": ("kind", "draw", "cycle"), "drawn": DRAWN, "vectors": VECTORS}
    return Conversations(ConversationConfig("emoji", **{**options, "system": "", **changes}))


def test_emoji_are_drawn_and_asked_about():
    data = of_emoji(split="heldout", questions=("kind", "draw", "draw", "cycle", "cycle_name"))
    pictures = len(data.images)
    assert len(data) == 5 * pictures
    texts = [shown(data.row(i)[0]) for i in range(5)]
    assert ["<img>" in text for text in texts] == [False, True, True, True, True]
    assert texts[1] == texts[2] and KIND_QUESTION in texts[3]
    caption = next(iter(sources.open_source("emoji", "", "heldout")))["caption"]
    assert texts[4].startswith(texts[1].removesuffix("</s>"))
    assert texts[4].endswith(f"{NAME_QUESTION} ASSISTANT: {caption}</s>")
    requests = list(drawing.first_drawings(data))
    assert list(drawing.first_drawings(data, 5)) == requests[:4]
    assert len(requests) == 4 * pictures and requests[0][1] == data.source[0].image
    with pytest.raises(ValueError, match="does not draw"):
        of_emoji(drawn=None)


def test_emoji_are_drawn_from_tags():
    data = of_emoji(split="heldout", questions=("draw_tags",))
    tags = {e["name"]: e["tags"] for e in sources.open_source("emoji", "", "heldout")}
    requests = {image: text for text, image in drawing.first_drawings(data)}
    assert requests.keys() == tags.keys()
    for image, text in requests.items():
        asked = text.split(", ")
        assert len(asked) == min(3, len(tags[image])) and {*asked} <= {*tags[image]}
    assert any(requests[image] != ", ".join(own[:3]) for image, own in tags.items())


def test_requests_are_dropped_by_seed_and_place():
    """In some places of the stream, again when it is resumed, and never for what is only read."""
    data = of_emoji(drop_rate=0.5, questions=("kind", "draw"))
    options = {"batch_size": 16, "seed": 3, "pixels": False}

    def asked(batch, i):
        ids = batch["ids"][i][batch["segments"][i] > 0]
        return "USER:  ASSISTANT: <img>" not in TEXT.decode(ids)

    stream = batches.train_batches(data, **options)
    first = [next(stream) for _ in range(3)]
    draws = [(b, i) for b in first for i in range(16) if b["places"][i].min() < -1]
    found = [asked(*pair) for pair in draws]
    assert 0.2 < np.mean(found) < 0.8
    later = batches.train_batches(data, **options)
    later.set_state([stream.get_state()])
    one, other = next(stream), next(later)
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])
    mixed = MixedConversations({"a": of_emoji(drop_rate=1.0, questions=("draw",))}, [1.0])
    batch = next(batches.train_batches(mixed, **options))
    assert not any(asked(batch, i) for i in range(16))


def test_pairs_of_picture_and_caption_are_drawn(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(picture(1)))
    lines = [{"image": "a.png", "caption": "a cat"}, {"image": "a.png"}]
    lines.append({"image": "a.png", "tags": ["animal", "pet"]})  # no caption, as templates want it
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    how = {"path": str(tmp_path / "pairs.jsonl"), "split": "all", "task": "draw", "system": ""}
    config = ConversationConfig("jsonl", drawn=DRAWN, vectors=VECTORS, image_size=16, **how)
    data = Conversations(config)
    rows = [data.row(i) for i in range(len(data))]
    assert shown(rows[0][0]).startswith("<s>USER: a cat ASSISTANT: <img>[c2]")
    assert rows[1:] == [None, None] == [data.row(i, np.random.default_rng(0)) for i in (1, 2)]
    of_tags = Conversations(dataclasses.replace(config, captions=("{tags}", "{caption}")))
    assert "USER: animal, pet ASSISTANT" in shown(of_tags.row(2)[0])
    assert data.image(rows[0][1]).shape == (16, 16, 3)
    with pytest.raises(ValueError, match=r"'\{colour\}' must name some of"):
        dataclasses.replace(config, task="chat", captions=("{colour}",))
    with pytest.raises(ValueError, match=r"does not draw.*\n?.*order=random"):
        ConversationConfig("jsonl", order="grouped", **how)


def test_captions_to_draw_by_are_drawn_by_seed_and_place():
    """Other words in every epoch, again when it is resumed; the first caption in evaluation."""
    emoji = sources.open_source("emoji", "", "heldout")
    how = {"split": "heldout", "task": "draw", "system": "", "image_size": 16, "vectors": VECTORS}
    varied = {"captions": ("{caption}", "{words}"), "drop_rate": 0.3, "drawn": DRAWN}
    data = Conversations(ConversationConfig("emoji", **how, **varied))
    options = {"batch_size": len(emoji), "seed": 3, "pixels": False}

    def requests(batch):
        rows = zip(batch["ids"], batch["segments"], batch["image_index"][:, 0], strict=True)
        texts = {int(image): TEXT.decode(ids[own > 0]) for ids, own, image in rows}
        found = {i: text.split("USER: ")[1].split(" ASSISTANT")[0] for i, text in texts.items()}
        return [found[i] for i in range(len(emoji))]

    stream = batches.train_batches(data, **options)
    epochs = [requests(next(stream)) for _ in range(2)]
    for example, *asked in zip(emoji, *epochs, strict=True):
        texts = " ".join([example["caption"], *example["tags"]])
        words = {*re.split("[^\\w’-]+", texts), *texts.split()}
        assert all({*text.split()} <= words for text in asked)
    plain = np.mean([t == e["caption"] for t, e in zip(epochs[0], emoji, strict=True)])
    assert 0.2 < plain < 0.5 and 0.15 < np.mean([not text for text in epochs[0]]) < 0.45
    assert np.mean([a != b for a, b in zip(*epochs, strict=True)]) > 0.5
    later = batches.train_batches(data, **options)
    later.set_state([stream.get_state()])
    one, other = next(stream), next(later)
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name])
    kept = next(batches.eval_batches(data, batch_size=len(emoji), pixels=False))
    assert requests(kept) == [example["caption"] for example in emoji]


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "plain"])
def test_a_request_is_the_beginning_of_its_conversation(template):
    how = get_template(template, "")
    prompts = drawing.DrawingPrompts(TEXT, 100, how, 300)
    ids = prompts.encode("a cat")
    row = prepared(DRAW, template)
    first = int(np.flatnonzero(row["places"] < -1)[0])
    np.testing.assert_array_equal(ids[-first:], row["ids"][:first])
    assert (ids[:-first] == prompts.pad_id).all() and len(ids) == prompts.prefix_length
    assert prompts.image_start == 300
    assert (prompts.encode(f"a{IMAGE} cat") == ids).all()


def test_a_long_request_loses_its_end():
    prompts = drawing.DrawingPrompts(TEXT, 40, get_template("vicuna_v1", ""))
    text = TEXT.decode(prompts.encode("a very long cat " * 9), skip_special_tokens=True)
    assert text.startswith("USER: a very long cat") and text.endswith(" ASSISTANT: <img>")
    assert "9" not in text and prompts.cut_notes()
    with pytest.raises(ValueError, match="holds no request"):
        drawing.DrawingPrompts(TEXT, 5, get_template("vicuna_v1", "")).encode("cat")
