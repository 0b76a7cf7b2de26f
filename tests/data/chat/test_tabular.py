"""Conversations in tables: the same rows as from lines, roles, pictures, splits."""

import json

import numpy as np
import pytest
from picture_files import encode, plain

from tokenflow_jax.data.chat import batches as conversation_batches
from tokenflow_jax.data.chat.opened import ConversationConfig, Conversations
from tokenflow_jax.data.chat.tabular import TableConversations
from tokenflow_jax.data.chat.templates import GPT, HUMAN
from tokenflow_jax.data.examples import Broken

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def conversation(i):
    """Every fourth has no picture, every seventh no answer."""
    turns = [{"from": "human", "value": f"<image>\nWhat is {i}?" if i % 4 else f"Say {i}"}]
    return turns + [{"from": "gpt", "value": f"A {i}"}] * (i % 7 > 0)


def rows(count):
    """Return rows with the pictures inside."""
    cells = [{"bytes": encode(plain(i)), "path": f"{i}.png"} if i % 4 else None
             for i in range(count)]  # fmt: skip
    return {
        "image": pa.array(cells, STRUCT), "conversations": [conversation(i) for i in range(count)]
    }  # fmt: skip


def parquet(folder, columns, name="chat.parquet"):
    pq.write_table(pa.table(columns), folder / name, row_group_size=8)
    return str(folder / name)


def arrow(folder, columns):
    pytest.importorskip("datasets").Dataset(pa.table(columns)).save_to_disk(folder / "chat")
    return str(folder / "chat")


def batches_of(kind, path, **options):
    data = Conversations(
        ConversationConfig(
            kind, path, split="all", system="", image_size=16, vectors=4, max_length=128,
            buckets=(64,), order="grouped", threads=2,
        )
    )  # fmt: skip
    reader = conversation_batches.train_batches(data, batch_size=6, seed=3, **options)
    return data, [next(reader) for _ in range(6)]


@pytest.mark.parametrize(("kind", "write"), [("parquet", parquet), ("arrow", arrow)])
def test_batches_equal_those_of_lines(tmp_path, kind, write):
    lines = []
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(encode(plain(i)))
        image = {"image": f"{i}.png"} if i % 4 else {}
        lines.append(json.dumps({"conversations": conversation(i), **image}))
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    _, expected = batches_of("jsonl", str(tmp_path / "chat.jsonl"))
    path = write(tmp_path, rows(20))
    data, found = batches_of(kind, path)
    for one, other in zip(expected, found, strict=True):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])
    assert data.skipped.counts() == {"bad order of turns": 3}
    shares = [batches_of(kind, path, shard_index=i, shard_count=3)[1] for i in range(3)]
    for number, batch in enumerate(found):
        for key in ("ids", "image"):
            whole = np.concatenate([share[number][key] for share in shares])
            np.testing.assert_array_equal(whole, batch[key])


def test_only_the_text_is_read_for_the_rows(tmp_path, monkeypatch):
    read, real = [], pq.ParquetFile.read_row_group
    path = parquet(tmp_path, rows(20))
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, i, columns, **o: read.append(columns[0]) or real(self, i, columns, **o),
    )
    source = TableConversations("parquet", path)
    assert [bool(source[i].image) for i in range(20)] == [i % 4 > 0 for i in range(20)]
    assert set(read) == {"image.path", "conversations"}
    assert source.image_bytes(source[5].image) == encode(plain(5))
    assert source.label(5) == "chat.parquet row 5" and list(source.lengths()[:3]) == [-2, 6, 6]


def test_messages_with_roles_and_parts(tmp_path):
    picture = [{"bytes": encode(plain(1)), "path": None}]
    kind = pa.list_(
        pa.struct([
            ("role", pa.string()),
            ("content", pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())]))),
        ])
    )  # fmt: skip
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    messages = [
        [{"role": "user", "content": parts}, answer],
        [{"role": "user", "content": parts[1:]}, answer],
        [{"role": "system", "content": parts[1:]}, answer],
        None,
    ]
    images = pa.array([picture, picture, [], []], pa.list_(STRUCT))
    path = parquet(tmp_path, {"images": images, "messages": pa.array(messages, kind)})
    source = TableConversations("parquet", path)
    for index in (0, 1):  # a marker is added where the text has none
        assert source[index].turns == ((HUMAN, "<image>\nWhat?"), (GPT, "A cat."))
        assert source.image_bytes(source[index].image) == encode(plain(1))
    for index, reason in ((2, "bad role"), (3, "no conversations")):
        with pytest.raises(Broken) as caught:
            source[index]
        assert caught.value.reason == reason


def test_splits_and_tables_without_conversations(tmp_path):
    path = parquet(tmp_path, rows(200))
    parts = [TableConversations("parquet", path, split) for split in ("train", "heldout")]
    labels = [source.label(i) for source in parts for i in range(len(source))]
    assert sorted(labels) == sorted(f"chat.parquet row {i}" for i in range(200))
    other = parquet(tmp_path, {"words": ["a"]}, "other.parquet")
    with pytest.raises(ValueError, match=r"other\.parquet has the columns \['words'\]: none of"):
        TableConversations("parquet", other)


def test_turns_may_be_in_a_large_list(tmp_path):
    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    columns = rows(6)
    columns["conversations"] = pa.array(columns["conversations"], pa.large_list(turn))
    found = TableConversations("parquet", parquet(tmp_path, columns))
    assert found[1].turns == ((HUMAN, "<image>\nWhat is 1?"), (GPT, "A 1"))
