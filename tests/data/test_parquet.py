"""Parquet files: columns, splits, row groups, damage, exact resume; what `datasets` writes."""

import collections
import json
import sys

import numpy as np
import pytest
from picture_files import encode, plain

from tokenflow_jax.data import parquet, pipeline, sources, tables
from tokenflow_jax.data.built_in_text import ByteTokenizer
from tokenflow_jax.data.captions import batches as captions
from tokenflow_jax.data.examples import Broken, is_heldout
from tokenflow_jax.data.parquet import ParquetSource
from tokenflow_jax.data.text import PromptEncoder

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache folder of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def pictures(numbers, path="{}.png"):
    """Cells as Hugging Face stores pictures, each of one color."""
    return [{"bytes": encode(plain(i % 256)), "path": path.format(i)} for i in numbers]


def features(**columns):
    return {"huggingface": json.dumps({"info": {"features": columns}})}


def write(file, numbers=range(20), group=8, about=None, **columns):
    """Write a table; the pictures, where no column is given, are those of some numbers."""
    columns = columns or {"image": pa.array(pictures(numbers), STRUCT)}
    table = pa.table(columns).replace_schema_metadata(about)
    pq.write_table(table, file, row_group_size=group)
    return str(file)


def value_of(example):
    return int(pipeline.images.decode(example["bytes"])[0, 0, 0])


def everything(path, split="all", **options):
    source = ParquetSource(str(path), split, **options)
    return [source[i] for i in range(len(source))]


def test_what_datasets_writes(tmp_path):
    datasets = pytest.importorskip("datasets")
    about = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]),
        text=datasets.List(datasets.Value("string")), tags=datasets.List(datasets.Value("string")),
    )  # fmt: skip
    rows = {
        "image": pictures(range(30)), "label": [i % 2 for i in range(29)] + [-1],
        "text": [[f"a {i}", "b"] for i in range(30)], "tags": [["t"]] * 30,
    }  # fmt: skip
    datasets.Dataset.from_dict(rows, features=about).to_parquet(tmp_path / "x.parquet")
    source = ParquetSource(str(tmp_path / "x.parquet"))
    assert source.classes == ["cat", "dog"] and source.numbers == ("label",)
    assert source[3] == {
        "name": "3.png", "caption": "a 3", "captions": ["a 3", "b"], "tags": ["t"], "label": 1,
        "bytes": encode(plain(3)),
    }  # fmt: skip
    assert source[29]["label"] == -1
    assert [value_of(e) for e in everything(tmp_path / "x.parquet")] == list(range(30))


@pytest.mark.parametrize("name", ["image", "IMG", "jpg", "odd"])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), STRUCT, pa.list_(STRUCT)])
def test_columns_are_found_by_name_and_type(tmp_path, name, kind):
    cells = pictures(range(9))
    if "struct" not in str(kind):
        cells = [cell["bytes"] for cell in cells]
    elif "list" in str(kind):
        cells = [[cell] for cell in cells]
    texts, keys = pa.array([f"text {i}" for i in range(9)]), pa.array([b"k"] * 9, pa.binary(1))
    path = write(tmp_path / "x.parquet", **{name: pa.array(cells, kind)}, CAPTION=texts, key=keys)
    found = everything(path)
    assert [value_of(e) for e in found] == list(range(9))
    assert found[4]["caption"] == "text 4"
    assert found[4]["name"] == ("4.png" if kind == STRUCT else "x.parquet row 4")


@pytest.mark.parametrize(
    "column", [pa.binary_view(), pa.dictionary(pa.int32(), pa.binary()), pa.list_(pa.binary())]
)
def test_pictures_and_texts_of_other_types(tmp_path, column):
    cells = [encode(plain(i)) for i in range(3)]
    cells = [[cell] for cell in cells] if pa.types.is_list(column) else cells
    file = write(
        tmp_path / "a.parquet", image=pa.array(cells, column),
        text=pa.array(["a", None, "c"], pa.string_view()),
    )  # fmt: skip
    found = everything(file)
    assert [value_of(example) for example in found] == [0, 1, 2]
    assert [example.get("caption") for example in found] == ["a", None, "c"]


def test_a_file_may_lack_all_texts_of_a_column(tmp_path):
    cells = [encode(plain(i)) for i in range(2)]
    write(tmp_path / "a.parquet", image=cells, text=["a", "b"])
    write(tmp_path / "b.parquet", image=cells, text=pa.nulls(2))
    captions = [example.get("caption") for example in everything(tmp_path)]
    assert captions == ["a", "b", None, None]


def test_a_store_that_did_not_answer_is_asked_again(tmp_path, monkeypatch):
    source = ParquetSource(write(tmp_path / "a.parquet"))
    with monkeypatch.context() as broken:
        broken.setattr(parquet, "_state", lambda path: int("timeout"))
        with pytest.raises(Broken, match="timeout"):
            source[0]
    assert value_of(source[0]) == 0


def test_the_column_can_be_named(tmp_path):
    small, large = (pa.array([encode(plain(i, side)) for i in range(4)]) for side in (8, 16))
    path = write(tmp_path / "x.parquet", thumbnail=small, photo=large)
    with pytest.raises(ValueError, match=r"'thumbnail', 'photo'\] may hold pictures; choose with"):
        ParquetSource(path)
    config = pipeline.DataConfig("parquet", path, "all", 8, image_column="photo")
    assert pipeline.opened(config)[2]["image"].shape == (16, 16, 3)
    with pytest.raises(ValueError, match=r"'other' \(data.image_column\) holds no pictures"):
        ParquetSource(path, image_column="other")


def test_names_that_repeat_do_not_decide_on_the_split(tmp_path):
    same = pa.array(pictures(range(150), "image.png"), STRUCT)
    path = write(tmp_path / "same.parquet", image=same)
    found = {e["name"] for split in ("train", "heldout") for e in everything(path, split)}
    assert found == {f"same.parquet row {i}" for i in range(150)}
    assert 5 < len(everything(path, "val")) < 30
    other = write(tmp_path / "other.parquet", range(150))
    held = [f"{i}.png" for i in range(150) if is_heldout(f"{i}.png")]
    assert [e["name"] for e in everything(other, "heldout")] == held


def test_files_are_splits(tmp_path):
    (tmp_path / "data").mkdir()
    for name, numbers in (
        ("train-00000-of-00002", range(10)), ("train-00001-of-00002", range(10, 20)),
        ("validation-00000-of-00001", range(20, 25)), ("test-00000-of-00001", range(25, 28)),
    ):  # fmt: skip
        write(tmp_path / "data" / f"{name}.parquet", numbers)
    values = lambda split, path=tmp_path: [value_of(e) for e in everything(path, split)]  # noqa: E731
    assert values("train") == list(range(20))
    assert values("heldout") == values("validation") == list(range(20, 25))
    assert values("test") == [25, 26, 27] and len(values("all")) == 28
    assert values("all", tmp_path / "data" / "train-*.parquet") == list(range(20))
    assert values("train", tmp_path / "data" / "{train,test}-*.parquet") == list(range(20))
    with pytest.raises(ValueError, match="none of which is 'nonsense'"):
        values("nonsense")
    (tmp_path / "data" / "train-00000-of-00002.parquet").rename(tmp_path / "data" / "more.parquet")
    assert len(values("train")) == 28, "a file that is none of the splits: split by names"


def test_addresses_without_pictures(tmp_path):
    path = write(tmp_path / "x.parquet", URL=pa.array(["http://a/b"]), TEXT=pa.array(["a cat"]))
    with pytest.raises(ValueError, match="holds addresses of pictures") as caught:
        sources.open_source("parquet", path, "train")
    command = f"img2dataset --url_list={tmp_path} --input_format=parquet --url_col=URL"
    assert f"{command} --caption_col=TEXT --output_format=webdataset" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused_by_name(tmp_path):
    whole = write(tmp_path / "a.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-99])
    (tmp_path / "text.parquet").write_text("no Parquet\n" * 99)
    (tmp_path / "none.parquet").touch()
    for name in ("cut", "text", "none"):
        for path in (tmp_path / f"{name}.parquet", tmp_path / f"{{a,{name}}}.parquet"):
            with pytest.raises(ValueError, match=rf"{name}\.parquet is no Parquet file, or damag"):
                ParquetSource(str(path))
    write(tmp_path / "z.parquet", words=pa.array(["a"]))
    with pytest.raises(ValueError, match=r"z\.parquet has the columns \['words'\]: none holds pic"):
        ParquetSource(str(tmp_path / "z.parquet"))
    write(tmp_path / "b.parquet", picture=pa.array([b"x"]))
    with pytest.raises(
        ValueError, match=r"b\.parquet has other columns than .*'picture', not 'image'"
    ):
        ParquetSource(str(tmp_path / "{a,b}.parquet"))
    with pytest.raises(ValueError, match=r"c\.parquet is missing"):
        ParquetSource(str(tmp_path / "c.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"names no files; name a \.parquet, a"):
        ParquetSource(str(tmp_path / "empty"))
    assert len(everything(whole)) == 20


def test_without_the_package(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"need the package pyarrow: pip install '\.\[parquet\]'"):
        sources.open_source("parquet", path, "train")


def test_bad_rows_are_broken(tmp_path):
    cells = [*pictures(range(3)), None, {"bytes": None, "path": "a/b.jpg"},
             {"bytes": b"no picture", "path": "c"}]  # fmt: skip
    texts = pa.array(["a", "b", None, "d", "e", "f"])
    labels = pa.array([0, None, 1, 2, 3, -5])
    path = write(tmp_path / "x.parquet", image=pa.array(cells, STRUCT), caption=texts, label=labels)
    source = ParquetSource(path)
    assert source[1]["label"] == -1 and "caption" not in source[2]
    for index, reason, text in (
        (3, "no picture", "row 3: the cell is empty"),
        (4, "no picture", "only its path 'a/b.jpg' is stored"),
        (5, "damaged record", "its label is -5"),
    ):
        with pytest.raises(Broken, match=text) as caught:
            source[index]
        assert caught.value.reason == reason
    several = pa.array([pictures([1, 2]), pictures([3])], pa.list_(STRUCT))
    source = ParquetSource(write(tmp_path / "y.parquet", images=several))
    assert value_of(source[1]) == 3
    with pytest.raises(Broken, match="several pictures"):
        source[0]


@pytest.mark.parametrize("column", [0, 1])
def test_damage_inside_loses_only_its_row_group(tmp_path, column, caplog):
    path = write(tmp_path / "x.parquet", range(40), group=10)
    footer, data = pq.read_metadata(path), bytearray((tmp_path / "x.parquet").read_bytes())
    chunk = footer.row_group(1).column(column)
    at = chunk.dictionary_page_offset or chunk.data_page_offset
    data[at : at + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    (tmp_path / "x.parquet").write_bytes(data)
    decoded = pipeline.opened(pipeline.DataConfig("parquet", path, "all", 8))
    usable = [i for i in range(40) if decoded[i] is not None]
    assert usable == [*range(10), *range(20, 40)]
    assert decoded.skipped.counts() == {"damaged record": 10}
    assert ("its column image.path is damaged" in caplog.text) == (column == 1)


def test_a_file_that_changes_under_a_run(tmp_path):
    source = ParquetSource(write(tmp_path / "y.parquet"))
    write(tmp_path / "y.parquet", range(5))
    with pytest.raises(Broken, match=r"y\.parquet has changed since the start"):
        source[0]


def test_only_needed_columns_and_each_row_group_once(tmp_path, monkeypatch):
    more = pa.array([b"x" * 1000] * 40)
    path = write(tmp_path / "x.parquet", image=pa.array(pictures(range(40)), STRUCT), other=more)
    read, real = [], pq.ParquetFile.read_row_group

    def spy(self, number, columns, **options):
        read.append((number, columns))
        return real(self, number, columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    source = ParquetSource(path)
    assert read == [(i, ["image.path"]) for i in range(5)]
    read.clear()
    for i in np.random.default_rng(0).permutation(40):
        assert value_of(source[int(i)]) == i
    assert sorted(read) == [(i, ["image"]) for i in range(5)]


def test_row_groups_are_kept_up_to_a_limit(tmp_path, caplog):
    path = write(tmp_path / "x.parquet", range(2000), group=20)
    rows = parquet.ParquetRows(path, "", False, parquet_states(path))
    size = rows.cache.get(0, ("image",)).nbytes
    rows.cache.limit = 4 * size
    for row in np.random.default_rng(0).permutation(2000):
        rows.read(int(row), ["image"])
        assert sum(rows.cache._sizes.values()) == rows.cache._bytes <= 4 * size
        assert len(rows.cache._kept) <= 4
    assert caplog.text.count("train with --config.data.shuffle_block=20") == 1
    caplog.clear()
    rows = parquet.ParquetRows(path, "", False, parquet_states(path))
    rows.cache.limit = 4 * size
    for step in (1, 1, 10, 10):  # as all and what is held out are read in order
        for row in range(0, 2000, step):
            rows.read(row, ["image"])
    assert not caplog.text


def parquet_states(path):
    return [(path, parquet._state(path))]


def no_index(*args):
    raise AssertionError("went through the file again")


def test_indexes_are_kept(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", range(1200), group=100)
    first = [e["name"] for e in everything(path, "heldout")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.parquet", "x.parquet.index.npz"]
    parquet._opened.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(tables, "held_out_rows", no_index)
        assert [e["name"] for e in everything(path, "heldout")] == first
    with np.load(tmp_path / "x.parquet.index.npz") as kept:
        right = dict(kept)
    for wrong in ({"groups": right["groups"] * 2}, {"groups": -right["groups"]}):
        np.savez(tmp_path / "x.parquet.index.npz", **{**right, **wrong})
        parquet._opened.cache_clear()
        assert [e["name"] for e in everything(path, "heldout")] == first


@pytest.mark.parametrize("block", [0, 8])
@pytest.mark.parametrize("shares", [2, 3])
def test_every_picture_once_per_pass_and_exact_resume(tmp_path, shares, block):
    for i in range(4):
        write(tmp_path / f"{i}.parquet", range(40 * i, 40 * (i + 1)))
    config = pipeline.DataConfig(
        "parquet", str(tmp_path), "all", 8, "center", shuffle_block=block, shuffle_window=32
    )

    def group(number):
        return [
            pipeline.train_batches(
                config, batch_size=6 // number, seed=3, shard_index=i, shard_count=number
            )
            for i in range(number)
        ]

    def step(group):
        return np.concatenate([next(share)["image"][:, 0, 0, 0] for share in group])

    reference = group(1)
    steps = [step(reference) for _ in range(160 // 3 + 2)]
    values = np.concatenate(steps)
    for epoch in (values[:160], values[160:320]):
        assert collections.Counter(epoch.tolist()) == collections.Counter(range(160))
    current = group(shares)
    for number in range(4):
        np.testing.assert_array_equal(step(current), steps[number])
    for then, first in ((shares, 4), (shares % 3 + 1, 6)):
        states = json.loads(json.dumps([share.get_state() for share in current]))
        current = group(then)
        for share in current:
            share.set_state(states)
        for number in (first, first + 1):
            np.testing.assert_array_equal(step(current), steps[number])


def test_captions_train(tmp_path):
    texts = pa.array([[f"picture {i}"] for i in range(20)])
    path = write(tmp_path / "x.parquet", image=pa.array(pictures(range(20)), STRUCT), text=texts)
    examples = captions.Pictures(pipeline.DataConfig("parquet", path, "train", 8))
    prompts = PromptEncoder(ByteTokenizer(), 24)
    batches = captions.train_batches(
        examples, captions.CaptionConfig(), prompts, batch_size=4, seed=0, shard_index=0,
        shard_count=1,
    )  # fmt: skip
    batch = next(batches)
    for row in range(4):
        number = int(batch["image"][row, 0, 0, 0])
        assert list(batch["prefix"][row]) == list(prompts.encode(f"picture {number}"))
