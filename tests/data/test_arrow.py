"""Data sets that `datasets` saved to disk: splits, orders of rows, damage."""

import json

import numpy as np
import pytest
from picture_files import encode, plain

from tokenflow_jax import remote
from tokenflow_jax.data import arrow, pipeline, sources
from tokenflow_jax.data.arrow import ArrowSource
from tokenflow_jax.data.examples import Broken

pa = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.ipc")
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(numbers, **more):
    cells = [{"bytes": encode(plain(i % 256)), "path": f"{i}.png"} for i in numbers]
    return pa.table({"image": pa.array(cells, STRUCT), **more})


def write(folder, *tables, batch=8, state=None):
    """Write a folder as `save_to_disk` does."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, rows in zip(names, tables, strict=True):
        stream(folder / name, rows, batch)
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, **(state or {})}))
    (folder / "dataset_info.json").write_text("{}")
    return str(folder)


def stream(path, rows, batch=8):
    with pa.ipc.new_stream(str(path), rows.schema) as out:
        out.write_table(rows, max_chunksize=batch)


def values(path, split="all"):
    source = ArrowSource(str(path), split)
    return [int(pipeline.images.decode(source[i]["bytes"])[0, 0, 0]) for i in range(len(source))]


def test_what_datasets_saves(tmp_path):
    datasets = pytest.importorskip("datasets")
    about = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]),
        caption=datasets.Value("string"),
    )  # fmt: skip
    rows = {
        "image": [{"bytes": encode(plain(i)), "path": f"{i}.png"} for i in range(50)],
        "label": [i % 2 for i in range(50)], "caption": [f"a {i}" for i in range(50)],
    }  # fmt: skip
    whole = datasets.Dataset.from_dict(rows, features=about)
    whole.save_to_disk(tmp_path / "one", num_shards=3)
    source = sources.open_source("arrow", str(tmp_path / "one"), "train")
    assert source.classes == ["cat", "dog"] and len(source) == 50
    assert source[3] == {
        "name": "3.png", "caption": "a 3", "captions": ["a 3"], "label": 1,
        "bytes": encode(plain(3)),
    }  # fmt: skip
    whole.shuffle(seed=0).select(range(5)).save_to_disk(tmp_path / "some")
    expected = [row["label"] for row in whole.shuffle(seed=0).select(range(5))]
    source = ArrowSource(str(tmp_path / "some"))
    assert [source[i]["label"] for i in range(len(source))] == expected
    parts = {"train": whole.select(range(30)), "validation": whole.select(range(30, 50))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "parts")
    assert values(tmp_path / "parts", "train") == list(range(30))
    assert values(tmp_path / "parts", "heldout") == list(range(30, 50))


def test_splits_of_a_folder_are_those_of_names(tmp_path):
    path = write(tmp_path / "d", table(range(100)), table(range(100, 150)))
    train, heldout = values(path, "train"), values(path, "heldout")
    assert sorted(train + heldout) == list(range(150)) and 5 < len(heldout) < 30
    write(tmp_path / "dict" / "fr", table(range(3)))
    write(tmp_path / "dict" / "en", table(range(3, 5)))
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["en", "fr"]}')
    assert values(tmp_path / "dict", "fr") == [0, 1, 2] and values(tmp_path / "dict", "en") == [
        3,
        4,
    ]
    with pytest.raises(ValueError, match=r"the splits \['en', 'fr'\], none of which is 'train'"):
        ArrowSource(str(tmp_path / "dict"), "train")


@pytest.mark.parametrize("key", ["_indices_files", "_indices_data_files"])
def test_orders_of_rows_are_respected(tmp_path, key):
    state = {key: [{"filename": "indices.arrow"}]}
    path = write(tmp_path / "d", table(range(20)), state=state)
    indices = pa.table({"indices": pa.array([7, 3, 19, 3], pa.uint64())})
    stream(tmp_path / "d" / "indices.arrow", indices)
    assert values(path) == [7, 3, 19, 3]
    arrow.open_rows.cache_clear()
    stream(tmp_path / "d" / "indices.arrow", pa.table({"indices": pa.array([20], pa.uint64())}))
    with pytest.raises(ValueError, match=r"indices\.arrow names rows beyond 20"):
        ArrowSource(path)


def test_damage_is_named(tmp_path):
    path = write(tmp_path / "d", table(range(100)))
    (file,) = (tmp_path / "d").glob("*.arrow")
    whole = file.read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"no Arrow file" * 9):
        file.write_bytes(data)
        arrow.open_rows.cache_clear()
        with pytest.raises(ValueError, match="is no Arrow file, or damaged"):
            ArrowSource(path)
    file.unlink()
    with pytest.raises(ValueError, match=r"00001\.arrow is missing"):
        ArrowSource(path)
    for text, message in (
        ('{"_data_files": [{"filename": "../x"}]}', "'../x' is not a name in its folder"),
        ('{"_data_files": []}', "has no rows"),
        ("{}", "state.json lacks '_data_files'"),
    ):
        (tmp_path / "d" / "state.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            ArrowSource(path)
    for other in (str(tmp_path), "", str(tmp_path / "none")):
        with pytest.raises(ValueError, match="is not a folder that save_to_disk"):
            ArrowSource(other)
    write(tmp_path / "text", pa.table({"words": ["a"]}))
    with pytest.raises(ValueError, match=r"has the columns \['words'\]: none holds pictures"):
        ArrowSource(str(tmp_path / "text"))


def test_places_outside_the_file_are_broken_rows(tmp_path):
    path = write(tmp_path / "d", table(range(9)))
    (file,) = (tmp_path / "d").glob("*.arrow")
    batch = next(iter(pa.ipc.open_stream(str(file) and file.read_bytes())))
    offsets = batch.column(0).field("bytes").buffers()[1].to_pybytes()
    wrong = np.frombuffer(offsets, np.int32).copy()
    wrong[5] = 2**30
    file.write_bytes(file.read_bytes().replace(offsets, wrong.tobytes()))
    source = ArrowSource(path)
    for index in (4, 5):
        with pytest.raises(Broken, match="damaged record"):
            source[index]
    assert source[3]["name"] == "3.png" and source[6]["name"] == "6.png"


def test_only_a_data_set_is_fetched_from_a_bucket(tmp_path, bucket):
    write(tmp_path / "one", table(range(9)))
    remote.upload(tmp_path / "one", f"{bucket}/one")
    remote.write(f"{bucket}/other/large.bin", b"")
    for path in (f"{bucket}/other", f"{bucket}/none"):
        with pytest.raises(ValueError, match="is not a folder that save_to_disk"):
            ArrowSource(path, "all")
    assert not (remote.cache_folder() / "files").exists()
    assert values(f"{bucket}/one") == list(range(9))
