"""Conversations in tars: the same rows as from lines, with their pictures."""

import io
import json
import tarfile

import numpy as np
import pytest
from picture_files import encode, plain

from tokenflow_jax.data.chat import batches as conversation_batches
from tokenflow_jax.data.chat.opened import ConversationConfig, Conversations
from tokenflow_jax.data.chat.tabular import TarConversations
from tokenflow_jax.data.examples import Broken


def write(path, samples):
    with tarfile.open(path, "w") as tar:
        for name, data in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def turns(i):
    asked = {"from": "human", "value": f"<image>\nWhat is {i}?"}
    return [asked, {"from": "gpt", "value": f"A {i}"}]


def test_batches_equal_those_of_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    samples, lines = {}, []
    for i in range(20):
        picture = encode(plain(i))
        (tmp_path / f"{i}.png").write_bytes(picture)
        lines.append(json.dumps({"image": f"{i}.png", "conversations": turns(i)}))
        samples |= {f"{i:03d}.png": picture}
        samples |= {f"{i:03d}.json": json.dumps({"conversations": turns(i)}).encode()}
    write(tmp_path / "a.tar", samples)
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    found = []
    for kind, file in (("jsonl", "chat.jsonl"), ("webdataset", "a.tar")):
        config = ConversationConfig(
            kind, str(tmp_path / file), split="all", system="", image_size=16, vectors=4,
            max_length=128, order="grouped",
        )  # fmt: skip
        reader = conversation_batches.train_batches(Conversations(config), batch_size=6, seed=3)
        found.append([next(reader) for _ in range(6)])
        reader.close()
    for ours, theirs in zip(*found, strict=True):
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_messages_and_samples_without_a_conversation(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    talk = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
    write(tmp_path / "a.tar", {
        "a.png": encode(plain(1)), "a.json": json.dumps({"messages": talk}).encode(),
        "b.png": encode(plain(2)), "b.json": json.dumps({"caption": "x"}).encode(),
        "c.png": encode(plain(3)),
        "d.png": encode(plain(4)), "d.json": b"{",
    })  # fmt: skip
    source = TarConversations(str(tmp_path / "a.tar"), "all")
    assert source[0].turns == (("human", "<image>\nWhat?"), ("gpt", "A cat."))
    assert source.image_bytes(source[0].image) == encode(plain(1))
    assert source.lengths().tolist()[1:] == [1, 1, 1]
    for index, text in ((1, "no conversations"), (2, "no conversations"), (3, "invalid JSON")):
        with pytest.raises(Broken, match=text):
            source[index]
