"""Conversations: files, pictures, rows, batches, and the validator's planted faults."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from picture_files import encode, picture

from tokenflow_jax.data import sources, validate
from tokenflow_jax.data.chat import batches as conversation_batches
from tokenflow_jax.data.chat import conversations
from tokenflow_jax.data.chat.conversations import fit_image
from tokenflow_jax.data.chat.emoji import KIND_QUESTION, KINDS, EmojiConversations
from tokenflow_jax.data.chat.opened import ConversationConfig, Conversations
from tokenflow_jax.data.chat.templates import GPT, HUMAN, IGNORE, IMAGE
from tokenflow_jax.data.examples import Broken

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "i2t_images.npz"
# Ten faults by the reason that the validator gives; training skips all of them.
FAULTS = {
    "invalid JSON": '{"conversations": [',
    "not UTF-8": b'{"conversations": [{"from": "human", "value": "\xff"}]}',
    "no conversations": '{"image": "a.png"}',
    "bad role": '{"conversations": [{"from": "user", "value": "x"}]}',
    "bad order of turns": [(HUMAN, "a"), (HUMAN, "b"), (GPT, "c"), (GPT, "d")],
    "missing image": ("nowhere.png", [(HUMAN, "<image>\nWhat?"), (GPT, "A cat.")]),
    "image not an image": ("text.png", [(HUMAN, "<image>\nWhat?"), (GPT, "A cat.")]),
    "several markers": (
        "a.png", [(HUMAN, "<image>\nThis?"), (GPT, "A."), (HUMAN, "<image>\nThat?"), (GPT, "B.")],
    ),
    "marker without image": [(HUMAN, "<image>\nWhat?"), (GPT, "A cat.")],
    "no labels": [(HUMAN, "Say: ASSISTANT: yes"), (GPT, "no")],
}  # fmt: skip
LONG = ("a.png", [(HUMAN, "<image>\nWhat?"), (GPT, "A cat. " * 50)])


def line(case):
    if isinstance(case, bytes | str):
        return case if isinstance(case, bytes) else case.encode()
    image, turns = case if isinstance(case, tuple) else (None, case)
    row = {"conversations": [{"from": role, "value": value} for role, value in turns]}
    return json.dumps(row | ({"image": image} if image else {}), ensure_ascii=False).encode()


@pytest.fixture
def folder(tmp_path):
    """Good conversations, with and without a picture, and a fault between any two of them."""
    (tmp_path / "a.png").write_bytes(encode(picture(1)))
    (tmp_path / "text.png").write_text("no picture\n")
    lines = []
    for i, case in enumerate(FAULTS.values()):
        good = [(HUMAN, f"<image>\nWas ist das? Nummer {i}"), (GPT, "Ein Käse — 🧀.")]
        lines += [line(("a.png", good)), line(case), line([(HUMAN, f"{i}?"), (GPT, "ja")])]
    (tmp_path / "chat.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return tmp_path


def config(folder, **changes):
    fields = {
        "name": "jsonl", "path": str(folder / "chat.jsonl"), "split": "all", "system": "",
        "image_size": 16, "vectors": 4, "max_length": 128, "buckets": (64, 128), "threads": 2,
    }  # fmt: skip
    return ConversationConfig(**fields | changes)


@pytest.mark.parametrize("i", range(4))
@pytest.mark.parametrize("mode", ["pad", "square"])
def test_images_equal_the_reference(i, mode):
    """One gray level is allowed for other versions of the resizing code."""
    from PIL import Image

    with np.load(GOLDEN) as file:
        if f"in{i}" in file.files:
            image = file[f"in{i}"]
        else:
            small = Image.fromarray(file[f"in{i}_small"])
            size = tuple(file[f"in{i}_size_wh"].tolist())
            image = np.asarray(small.resize(size, Image.Resampling.BICUBIC))
        want, mean, std = (file[f"out{i}_{mode}{end}"] for end in ("", "_mean", "_std"))
    got = fit_image(image, 384, mode).astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(got[::8, ::8].transpose(2, 0, 1), want, atol=0.008)
    np.testing.assert_allclose(got.mean((0, 1)), mean, atol=1e-4)
    np.testing.assert_allclose(got.std((0, 1)), std, atol=1e-4)


def test_lines_are_read_by_bytes(folder):
    """Umlauts and emoji before a line must not shift it."""
    source = conversations.JsonlConversations(folder / "chat.jsonl")
    assert source[27].turns[0] == (HUMAN, "<image>\nWas ist das? Nummer 9")
    assert source[27].turns[1] == (GPT, "Ein Käse — 🧀.")
    assert source.lengths()[27] == 10 and source.lengths()[29] == -2


@pytest.mark.parametrize("image", ["", "None", "none", "nan", None, float("nan")])
def test_no_image(image):
    row = {"conversations": [{"from": "human", "value": "a"}], "image": image}
    sample = conversations.parse_line(json.dumps(row).encode())
    assert sample.image == "" and sample.has_image_key and sample.length() == 1


def test_training_skips_the_faults(folder):
    """Each good conversation once per epoch; faults are counted and leave empty rows."""
    data = Conversations(config(folder))
    batches = conversation_batches.train_batches(data, batch_size=6, seed=3)
    rows = [next(batches) for _ in range(5)]
    learned = sum(int((batch["labels"] != IGNORE).any(1).sum()) for batch in rows)
    assert learned == 20
    for batch in rows:
        assert batch["ids"].shape in {(6, 64), (6, 128)} and batch["image"].shape == (
            6,
            1,
            16,
            16,
            3,
        )
        assert (batch["labels"][batch["segments"] == 0] == IGNORE).all()
    text = data.text_tokenizer.decode(
        np.concatenate([b["labels"][b["labels"] >= 0] for b in rows]), skip_special_tokens=True
    )
    assert text.count("Ein Käse — 🧀.") == 10 and text.count("ja") == 10
    counts = data.skipped.counts()
    assert counts == dict.fromkeys(FAULTS, 1)
    assert "skipped 10 of 30" in data.notes()[0]


def test_the_validator_finds_ten_faults(folder, capsys):
    arguments = [str(folder / "chat.jsonl"), "--template=vicuna_v1", "--vectors=4"]
    assert validate.run(arguments) == 1
    out = capsys.readouterr().out.splitlines()
    for i, reason in enumerate(FAULTS):
        assert out[i].startswith(f"line {3 * i + 2}: {reason}"), out[i]
    assert len(out) == 11 and "30 conversations, 10 of them are skipped" in out[-1]


def test_the_validator_in_several_processes(folder, capsys, monkeypatch):
    """The same faults in the same order, also in lines that are handed out later."""
    monkeypatch.setattr(validate, "_LINES_AT_A_TIME", 2)
    monkeypatch.setattr(validate, "_TELL_EVERY", 0.0)
    arguments = [str(folder / "chat.jsonl"), "--template=vicuna_v1", "--vectors=4"]
    results = []
    for count in (1, 2):
        assert validate.run([*arguments, f"--processes={count}"]) == 1
        results.append(capsys.readouterr())
    assert results[0].out == results[1].out and len(results[0].out.splitlines()) == 11
    assert "100% of the file" in results[1].err and "10 faults so far" in results[1].err


def test_the_validator_names_faults_that_training_tolerates(folder, capsys):
    file = folder / "odd.jsonl"
    doubled = ("a.png", [(HUMAN, "<image><image>\nWhat?"), (GPT, " ")])
    short = ["--template=vicuna_v1", "--vectors=4", "--max_length=100"]
    first = [(GPT, "Hello."), (HUMAN, "Hi."), (GPT, "Yes?")]
    file.write_bytes(b"\n\n".join(map(line, (LONG, doubled, first))))
    assert validate.run([str(file), "--template=vicuna_v1", "--vectors=4", "--max_length=300"]) == 1
    out = capsys.readouterr().out
    for text in ("line 1: over length", "line 3: several markers", "line 3: empty answer",
                 "line 5: first turn", "0 of them are skipped"):  # fmt: skip
        assert text in out
    for system, skipped in (([], 3), (["--system="], 0)):  # the template's own has no room
        assert validate.run([str(file), *short, *system]) == 1
        assert f"{skipped} of them are skipped" in capsys.readouterr().out


def test_the_validator_knows_drawn_pictures(folder, capsys):
    """A picture in an answer is its codes; a model that only reads takes its vectors there."""
    file = folder / "drawn.jsonl"
    drawn = ("a.png", [(HUMAN, "a cat"), (GPT, "<image>"), (HUMAN, "What?"), (GPT, "A cat.")])
    file.write_bytes(line(drawn))
    run = [str(file), "--template=vicuna_v1", "--vectors=4", "--system="]
    assert validate.run([*run, "--max_length=60"]) == 0
    assert validate.run([*run, "--codes=30"]) == 0
    capsys.readouterr()
    assert validate.run([*run, "--codes=60", "--max_length=60"]) == 1
    assert "picture beyond the end" in capsys.readouterr().out
    assert validate.run([*run, "--codes=30", "--max_length=60"]) == 1
    assert "tokens, cut to 60" in capsys.readouterr().out


def test_the_validator_names_swapped_roles_and_lost_answers(folder, capsys):
    """With swapped roles the first turn is left out, with its picture; the order is the fault."""
    file = folder / "odd.jsonl"
    swapped = ("a.png", [(GPT, "<image>\nWhat?"), (HUMAN, "A cat.")])
    buried = ("a.png", [(HUMAN, "<image>\n" + "What? " * 100), (GPT, "A cat.")])
    file.write_bytes(b"\n".join(map(line, (swapped, buried))))
    assert validate.run([str(file), "--vectors=4", "--max_length=300"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("line 1: bad order of turns") and "left out" in out[0]
    assert "before the first answer starts" in out[1] and len(out) == 3


def test_the_validator_as_a_program(folder):
    good = folder / "good.jsonl"
    good.write_bytes(line([(HUMAN, "a"), (GPT, "b")]))
    run = [sys.executable, "-m", "tokenflow_jax.data.validate"]
    assert subprocess.run([*run, str(good)], capture_output=True, check=False).returncode == 0
    nothing = subprocess.run([*run, str(folder / "x")], capture_output=True, check=False, text=True)
    assert nothing.returncode == 2 and "is not a file" in nothing.stderr


@pytest.mark.parametrize("order", ["random", "grouped"])
def test_batches_are_reproducible_and_resume(folder, order):
    data = Conversations(config(folder, order=order))
    make = lambda seed=0, **options: conversation_batches.train_batches(  # noqa: E731
        data, batch_size=4, seed=seed, **options
    )
    first = make()
    whole = [next(first) for _ in range(9)]
    again = make()
    for _ in range(4):
        next(again)
    resumed = make()
    resumed.set_state(json.loads(json.dumps(again.get_state())))
    for want in whole[4:]:
        got = next(resumed)
        assert all(np.array_equal(got[name], want[name]) for name in want)
    other = next(make(seed=1))
    assert not np.array_equal(other["ids"], whole[0]["ids"])
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        make(seed=1).set_state(first.get_state())


def test_hosts_share_a_batch(folder):
    """Two hosts' parts are the halves of one host's batch, of the same length."""
    data = Conversations(config(folder))
    whole = next(conversation_batches.train_batches(data, batch_size=6, seed=0))
    parts = [
        next(conversation_batches.train_batches(
            data, batch_size=6, seed=0, shard_index=i, shard_count=2
        ))
        for i in range(2)
    ]  # fmt: skip
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), array)


def spoken(data, batch):
    """Return the text of each conversation of a batch, checking that it has its picture."""
    found = []
    for r, segments in enumerate(batch["segments"]):
        for number in range(1, segments.max() + 1):
            where = segments == number
            places = batch["places"][r][where]
            text = data.text_tokenizer.decode(batch["ids"][r][where], skip_special_tokens=True)
            if (places >= 0).any():
                own = batch["image"][r, number - 1]
                first = (number - 1) * data.config.vectors
                assert places[places >= 0].tolist() == list(range(first, first + 4)) and own.any()
            if where.any():
                found.append(text)
    return sorted(found)


def test_conversations_share_rows(folder):
    """The same conversations per batch in fewer rows, the longest with the shortest."""
    apart = Conversations(config(folder))
    shared = Conversations(config(folder, pack=3, buckets=(96, 128, 192, 384)))
    batches = [
        conversation_batches.train_batches(data, batch_size=12, seed=3) for data in (apart, shared)
    ]
    for _ in range(5):
        one, other = (next(source) for source in batches)
        assert other["image"].shape == (4, 3, 16, 16, 3) and len(other["ids"]) == 4
        assert spoken(apart, one) == spoken(shared, other)
        assert other["ids"].shape[1] < 384
    halves = [
        next(conversation_batches.train_batches(
            shared, batch_size=12, seed=3, shard_index=i, shard_count=2
        ))
        for i in range(2)
    ]  # fmt: skip
    whole = next(conversation_batches.train_batches(shared, batch_size=12, seed=3))
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([h[name] for h in halves]), array)
    with pytest.raises(ValueError, match=r"3 conversations in a row.*multiple of 6"):
        conversation_batches.train_batches(shared, batch_size=9, seed=3, shard_count=2)


def test_long_conversations_share_rows_with_short_ones():
    rows = conversation_batches._share_rows([9, 1, 5, 8, 2, 4], 2)
    assert rows == [[0, 1], [3, 4], [2, 5]]
    assert conversation_batches._share_rows([9, 1, 5], 1) == [[0], [1], [2]]


def test_grouped_batches_are_of_one_kind(folder):
    data = Conversations(config(folder, order="grouped"))
    order = data.order(0, 0, 4)
    signs = np.sign(data.source.lengths()[order])
    assert sorted(order) == list(range(30))
    assert all(abs(signs[i : i + 4].sum()) == 4 for i in range(0, 24, 4))


def test_pictures_by_place(folder):
    data = Conversations(config(folder))
    batch = next(conversation_batches.train_batches(data, batch_size=30, seed=0, pixels=False))
    assert data.images == ["a.png", "nowhere.png", "text.png"]
    assert batch["image_index"].shape == (30, 1)


def test_no_usable_conversation(tmp_path):
    (tmp_path / "chat.jsonl").write_text("nothing\n")
    data = Conversations(config(tmp_path))
    with pytest.raises(ValueError, match=r"no usable conversation.*invalid JSON"):
        conversation_batches.train_batches(data, batch_size=1, seed=0)


def test_all_bad_config_values_are_named(folder):
    with pytest.raises(ValueError) as error:
        config(folder, order="x", image_mode="y", buckets=(5, 3), template="z", pack=0)
    for part in ("order", "image_mode", "buckets", "template", "pack is 0"):
        assert part in str(error.value)


def test_emoji():
    """Held-out pictures are the tokenizer's; every question has an answer in the data."""
    train, held_out = EmojiConversations("train"), EmojiConversations("heldout", ("kind",))
    assert len(held_out) == 158 and len(train) == 4 * 1404
    assert all(sources.is_heldout(held_out[i].image) for i in range(158))
    assert not any(sources.is_heldout(train[i].image) for i in range(len(train)))
    (role, question), (_, answer) = held_out[0].turns
    assert role == HUMAN and question.endswith(KIND_QUESTION) and answer in KINDS
    first = sources.EmojiSource("heldout")[0]
    assert first["name"] == held_out[0].image and KINDS[first["group"]] == answer
    answers = [train[i].turns[1][1] for i in range(3, len(train), 4)]
    assert set(answers) == {"yes", "no"} and 0.4 < answers.count("yes") / len(answers) < 0.6
    with pytest.raises(ValueError, match="color"):
        EmojiConversations("train", ("color",))


def test_questions_about_an_emoji_in_one_conversation():
    """In varying order, the picture with the first one, the answers as for single questions."""
    single = EmojiConversations("heldout", ("kind", "name"))
    both = EmojiConversations("heldout", ("kind", "name"), together=True)
    assert len(both) == 158 and len(single) == 2 * 158
    firsts = set()
    for i in range(158):
        sample, kind, name = both[i], single[2 * i], single[2 * i + 1]
        assert [role for role, _ in sample.turns] == [HUMAN, GPT] * 2
        assert sample.turns[0][1].startswith(IMAGE) and IMAGE not in sample.turns[2][1]
        assert {sample.turns[1], sample.turns[3]} == {kind.turns[1], name.turns[1]}
        firsts.add(sample.turns[0][1])
    assert len(firsts) == 2


def test_emoji_batches():
    fields = {"name": "emoji", "split": "heldout", "questions": ("kind",), "system": ""}
    data = Conversations(
        ConversationConfig(**fields, vectors=4, max_length=96, buckets=(96,), image_size=16), 40
    )
    assert len(data) == len(data.images) == len(data.source.lengths()) == 40
    batches = list(conversation_batches.eval_batches(data, batch_size=32))
    assert [int(b["segments"].any(1).sum()) for b in batches] == [32, 8]
    assert batches[0]["image"].std() > 10


def test_length_is_cut_like_the_reference(folder):
    data = Conversations(dataclasses.replace(config(folder), max_length=64, buckets=(64,)))
    sample = conversations.parse_line(line(LONG))
    row = conversations.prepare(sample, data.template, data.text_tokenizer, 4, 64)
    assert len(row["ids"]) == 64 and (row["labels"] != IGNORE).any()
    with pytest.raises(Broken, match="begin after the 8"):
        conversations.prepare(sample, data.template, data.text_tokenizer, 4, 8)


def many(folder, images, file="many.jsonl"):
    """Write a conversation about each picture."""
    rows = [(image, [(HUMAN, f"<image>\n{i}?"), (GPT, "ja")]) for i, image in enumerate(images)]
    (folder / file).write_bytes(b"\n".join(map(line, rows)))
    return config(folder, path=str(folder / file))


@pytest.mark.parametrize("pack", [1, 2])
@pytest.mark.parametrize("shards", [1, 2])
def test_conversations_whose_pictures_vanish_end_the_training(folder, pack, shards):
    data = Conversations(dataclasses.replace(many(folder, ["a.png"] * 8), pack=pack))
    batches = conversation_batches.train_batches(data, batch_size=4, seed=0, shard_count=shards)
    for _ in range(9):
        assert next(batches)["segments"].any()
    (folder / "a.png").unlink()
    with pytest.raises(ValueError, match=r"no usable conversation among the 8.*'missing image': 8"):
        for _ in range(300):
            next(batches)


def test_text_alone_keeps_the_training_going(folder):
    file = folder / "mixed.jsonl"
    rows = [("gone.png", [(HUMAN, "<image>\nx?"), (GPT, "y")])] * 9 + [[(HUMAN, "a"), (GPT, "b")]]
    file.write_bytes(b"\n".join(map(line, rows)))
    data = Conversations(config(folder, path=str(file)))
    batches = conversation_batches.train_batches(data, batch_size=2, seed=0)
    assert sum(bool(next(batches)["segments"].any()) for _ in range(200)) == 40


def test_an_evaluation_without_one_conversation_is_an_error(folder):
    data = Conversations(many(folder, ["gone.png"] * 3))
    with pytest.raises(ValueError, match=r"no usable conversation among the 3.*missing image"):
        list(conversation_batches.eval_batches(data, batch_size=2))


def test_odd_names_and_texts_are_skipped_and_named(folder, caplog):
    turns = [{"from": HUMAN, "value": "<image>\nWhat?"}, {"from": GPT, "value": "A cat."}]
    rows = [{"image": "a.png", "conversations": turns}] * 100
    for image in ("a\ud83d.png", "../a.png", "/dev/zero", "x" * 5000, ["a.png"]):
        rows.append({"image": image, "conversations": turns})
    rows.append({"conversations": [turns[0], {"from": GPT, "value": "half \ud83d"}]})
    file = folder / "odd.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    data = Conversations(config(folder, path=str(file), split="train", max_length=64))
    batches = conversation_batches.train_batches(data, batch_size=53, seed=0)
    for _ in range(2 * len(data) // 53 + 1):
        next(batches)
    counts = data.skipped.counts()
    assert counts == {"missing image": 2, "outside the folder": 2, "bad image": 1, "not text": 1}
    assert "odd.jsonl line 106: not text" in caplog.text and "x" * 300 not in caplog.text
    assert validate.run([str(file), "--vectors=4", "--template=vicuna_v1"]) == 1


def test_llava_s_array_of_conversations(folder, capsys):
    turns = [{"from": HUMAN, "value": '<image>\nIst [das], "so"?'}, {"from": GPT, "value": "}"}]
    rows = [{"id": i, "image": "a.png", "conversations": turns} for i in range(3)]
    file = folder / "llava.json"
    file.write_text(json.dumps([*rows, {"image": "a.png"}], indent=2))
    source = conversations.JsonlConversations(file)
    assert len(source) == 4 and source.label(3) == "llava.json element 4"
    assert [source[i].turns[0][1] for i in range(3)] == [turns[0]["value"]] * 3
    assert validate.run([str(file), "--vectors=4", "--template=vicuna_v1"]) == 1
    out = capsys.readouterr().out
    assert "line 4: no conversations" in out and "4 conversations, 1 of them" in out


def test_the_validator_reads_pictures_as_training_does(folder, capsys):
    (folder / "link.png").symlink_to("/dev/zero")
    (folder.parent / "out.png").write_bytes(encode(picture(1)))
    many(folder, ["a.png", "../out.png", "link.png", "/dev/zero", "a\nb.png"])
    run = [str(folder / "many.jsonl"), "--vectors=4", "--template=vicuna_v1"]
    for more in ([], ["--nodecode_images"]):
        assert validate.run([*run, *more]) == 1
        out = capsys.readouterr().out.splitlines()
        for i in range(3):
            assert out[i].startswith(f"line {i + 2}: outside the folder") and "allow_out" in out[i]
        assert out[3].startswith("line 5: missing image") and len(out) == 5
        assert validate.run([*run, *more, "--allow_outside"]) == 1
        assert len(capsys.readouterr().out.splitlines()) == 4


def test_pictures_outside_train_where_that_is_allowed(folder):
    (folder.parent / "outside.png").write_bytes(encode(picture(1)))
    wanted = many(folder, ["../outside.png"] * 4)
    with pytest.raises(ValueError, match=r"outside the folder': 4.*pass allow_outside"):
        batches = conversation_batches.train_batches(Conversations(wanted), batch_size=4, seed=0)
        for _ in range(99):
            next(batches)
    allowed = Conversations(dataclasses.replace(wanted, allow_outside=True))
    batch = next(conversation_batches.train_batches(allowed, batch_size=4, seed=0))
    assert batch["segments"].any(1).all() and not allowed.notes()
