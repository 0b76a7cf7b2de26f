"""Readers of data sets, pictures, questions, answers, prompts and metrics."""

import io
import json
import os
import pathlib
import tarfile
from typing import Any

import numpy as np
from PIL import Image

from tests.fuzz.readers import Files, Reader, collect
from tokenflow_jax import sample
from tokenflow_jax.data import arrow, cifar10, images, records
from tokenflow_jax.data.arrow import ArrowSource
from tokenflow_jax.data.chat.conversations import JsonlConversations
from tokenflow_jax.data.chat.tabular import TableConversations
from tokenflow_jax.data.examples import Broken
from tokenflow_jax.data.jsonl import JsonlSource
from tokenflow_jax.data.parquet import ParquetSource
from tokenflow_jax.data.sources import RecordSource
from tokenflow_jax.data.webdataset import WebDatasetSource
from tokenflow_jax.evals import understanding
from tokenflow_jax.train import curves

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def _picture(kind: str = "PNG", size: tuple[int, int] = (16, 12)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format=kind)
    return out.getvalue()


def _lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _items(source) -> None:
    """Read every example; one that cannot be used is counted, which Broken is for."""
    for index in range(len(source)):
        try:
            example = source[index]
            if isinstance(example, dict) and "bytes" in example:
                images.decode(example["bytes"])
        except Broken as error:
            assert len(str(error)) <= 2000 and str(error).isprintable(), ascii(str(error)[:3000])


def _dataset(folder: pathlib.Path) -> list[Files]:
    with records.DatasetWriter(folder) as writer:
        for i in range(3):
            about = {"label": i, "caption": "a cat", "tags": ["cat"]}
            writer.write("train", {"name": f"{i}.png", "bytes": _picture(), **about})
        writer.write("heldout", {"name": "c", "codes": np.arange(5)})
        writer.write("heldout", {"name": "r", "image": np.zeros((8, 8, 3), np.uint8)})
        writer.about = {"classes": ["cat", "dog", "cow"]}
    return [collect(folder)]


def _read_dataset(folder: pathlib.Path) -> None:
    for split in ("train", "heldout"):
        _items(RecordSource(str(folder), split))


def _read_record(folder: pathlib.Path) -> None:
    try:
        example = records.unpack((folder / "record").read_bytes())
        if "bytes" in example:
            images.decode(example["bytes"])
    except Broken as error:  # whoever reads the file names it
        raise Broken(f"record: {error}") from error


def _read_picture(folder: pathlib.Path) -> None:
    try:
        images.decode((folder / "picture").read_bytes())
    except Broken as error:  # whoever reads the file names it
        raise Broken(f"picture: {error}") from error


def _captions(folder: pathlib.Path) -> list[Files]:
    rows = {"image": "a.png", "caption": "a cat"}, {"file_name": "a.png", "captions": ["x", "y"]}
    return [
        {"captions.jsonl": _lines(*rows, {"image": "a.png", "tags": ["t"]}), "a.png": _picture()}
    ]


def _conversations(folder: pathlib.Path) -> list[Files]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    rows = {"image": "a.png", "conversations": turns}, {"conversations": turns[1:]}
    return [{"chat.jsonl": _lines(*rows), "a.png": _picture()}]


def _read_conversations(folder: pathlib.Path) -> None:
    _turns(JsonlConversations(folder / "chat.jsonl"))


def _turns(source) -> None:
    """Read every conversation and its picture."""
    for index in range(len(source)):
        try:
            if image := source[index].image:
                images.decode(source.image_bytes(image))
        except Broken as error:
            assert len(str(error)) <= 2000 and str(error).isprintable(), ascii(str(error)[:3000])


def _questions(folder: pathlib.Path) -> list[Files]:
    row = {"question_id": 1, "image": "a.png", "text": "A cat?", "options": ["a", "b"]}
    return [{"q.jsonl": _lines(row | {"answer": "Yes"}, row | {"question_id": "b", "answer": "b"})}]


def _answers(folder: pathlib.Path) -> list[Files]:
    return [{"a.jsonl": _lines({"question_id": 1, "answer": "x"}, {"question_id": 1, "text": "y"})}]


def _metrics(folder: pathlib.Path) -> list[Files]:
    return [{"metrics.jsonl": _lines({"step": 1, "loss/total": 0.5}, {"step": 2, "x": None})}]


def _prompts(folder: pathlib.Path) -> list[Files]:
    geneval = _lines({"prompt": "a bench", "tag": "x"}, {"prompt": "a red cat"})
    return [{"geneval.jsonl": geneval, "plain.txt": b"a cat\na dog\n", "dpg/a.txt": b"an apple"}]


def _read_prompts(folder: pathlib.Path) -> None:
    for layout, path in {"geneval": "geneval.jsonl", "plain": "plain.txt", "dpg": "dpg"}.items():
        sample.read_tasks(layout, [], str(folder / path))


def _cifar(folder: pathlib.Path) -> list[Files]:
    content = {f"data_batch_{i}.png": _picture("PNG", (1024, 2)) for i in range(1, 6)}
    content |= {"test_batch.png": _picture("PNG", (1024, 2))}
    content |= {"train_lables.json": b"[0,1,2,3,4,5,6,7,8,9]", "test_lables.json": b"[1,2]"}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=0) as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return [{"cifar.tgz": out.getvalue()}]


def _tars(folder: pathlib.Path) -> list[Files]:
    seeds = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        long = "folder/" * 20 + "b" * 90
        with tarfile.open(folder / "s.tar", "w", format=form) as tar:
            for name, data in (
                *(("a.png", _picture()), ("a.json", b'{"caption": "a cat"}'), ("a.cls", b"3")),
                *((f"{long}.png", _picture()), (f"{long}.txt", b"a dog")),
            ):
                info = tarfile.TarInfo(name)
                info.size, info.mtime = len(data), 1.5 if form == tarfile.PAX_FORMAT else 1
                tar.addfile(info, io.BytesIO(data))
        _read_tars(folder)  # leaves an index
        seeds.append(collect(folder))
    return seeds


def _read_tars(folder: pathlib.Path) -> None:
    if (folder / "s.tar").exists():
        os.utime(folder / "s.tar", ns=(0, 0))  # which the index must name
    _items(WebDatasetSource(str(folder / "s.tar")))


def _table() -> Any:
    import pyarrow as pa  # its absence leaves the other readers

    picture = {"bytes": _picture(), "path": "a.png"}
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    row = {"image": picture, "label": 1, "caption": "a cat", "tags": ["t"], "conversations": turns}
    rows = [row, row | {"image": picture | {"path": "b.png"}}, row | {"image": None}]
    return pa.Table.from_pylist(rows)


def _parquets(folder: pathlib.Path) -> list[Files]:
    import pyarrow.parquet as pq

    seeds = []
    for options in ({}, {"compression": "none", "use_dictionary": False}, {"row_group_size": 1}):
        pq.write_table(_table(), folder / "t.parquet", **options)
        seeds.append(collect(folder))
    return seeds


def _read_parquet(folder: pathlib.Path) -> None:
    _items(ParquetSource(str(folder / "t.parquet")))
    _turns(TableConversations("parquet", str(folder / "t.parquet")))


def _arrows(folder: pathlib.Path) -> list[Files]:
    import pyarrow as pa

    table = _table()
    for name, rows in (("t.arrow", table), ("i.arrow", pa.table({"indices": [2, 0, 1]}))):
        with pa.ipc.new_stream(str(folder / name), rows.schema) as out:
            out.write_table(rows)
    state = {"_data_files": [{"filename": "t.arrow"}], "_indices_files": [{"filename": "i.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))
    return [collect(folder)]


def _read_arrow(folder: pathlib.Path) -> None:
    arrow.open_rows.cache_clear()
    _items(ArrowSource(str(folder)))
    _turns(TableConversations("arrow", str(folder)))


READERS = {
    "dataset": Reader(_dataset, _read_dataset, {".json": "json"}),
    "record": Reader(
        lambda folder: [
            {"record": records.pack({"name": "a", "label": 1, "bytes": _picture()})},
            {"record": records.pack({"name": "a", "codes": np.arange(9)})},
            {"record": records.pack({"name": "a", "image": np.zeros((8, 8, 3), np.uint8)})},
        ],
        _read_record,
    ),
    "captions": Reader(
        _captions,
        lambda folder: _items(JsonlSource(folder / "captions.jsonl")),
        {".jsonl": "lines"},
    ),
    "tars": Reader(_tars, _read_tars),
    "parquet": Reader(_parquets, _read_parquet),
    "arrow": Reader(_arrows, _read_arrow, {".json": "json"}),
    "conversations": Reader(_conversations, _read_conversations, {".jsonl": "lines"}),
    "picture": Reader(
        lambda folder: [{"picture": _picture(kind)} for kind in _FORMATS], _read_picture
    ),
    "questions": Reader(
        _questions,
        lambda folder: understanding.read_questions(folder / "q.jsonl"),
        {".jsonl": "lines"},
    ),
    "answers": Reader(
        _answers, lambda folder: understanding.read_answers(folder / "a.jsonl"), {".jsonl": "lines"}
    ),
    "metrics": Reader(
        _metrics, lambda folder: curves.read_history(folder / "metrics.jsonl"), {".jsonl": "lines"}
    ),
    "prompts": Reader(_prompts, _read_prompts, {".jsonl": "lines"}),
    "cifar10": Reader(
        _cifar, lambda folder: list(cifar10.read_tarball(folder / "cifar.tgz")), {".tgz": "gzip"}
    ),
}
