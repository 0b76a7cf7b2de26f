"""Each kind of source, its splits and its errors."""

import io
import json

import numpy as np
import pytest
from picture_files import encode, picture, plain
from PIL import Image

from tokenflow_jax.data import folders, images, prepare, records, sources
from tokenflow_jax.data.examples import Broken

tfds = pytest.importorskip("tensorflow_datasets")


def write_folder(folder, names):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(plain(i % 256)))
    return folder


def names_of(source):
    return [source[i]["name"] for i in range(len(source))]


def test_emoji_split_is_fixed():
    sizes = {split: len(sources.EmojiSource(split)) for split in sources.SPLITS}
    assert sizes == {"train": 1404, "heldout": 158, "all": 1562}
    train, heldout = (set(names_of(sources.EmojiSource(s))) for s in ("train", "heldout"))
    assert not train & heldout
    assert {"1f621", "1f610"} <= train | heldout
    assert all(sources.is_heldout(name) for name in heldout)
    with pytest.raises(ValueError, match="no split 'test'"):
        sources.EmojiSource("test")


def test_emoji_have_captions_groups_and_pictures():
    source = sources.EmojiSource("all")
    assert source.numbers == ("group",)
    groups = {source[i]["group"] for i in range(len(source))}
    assert groups == set(range(len(sources.GROUPS)))
    by_name = {source[i]["name"]: source[i] for i in range(len(source))}
    bat = by_name["1f987"]
    assert (bat["caption"], sources.GROUPS[bat["group"]]) == ("bat", "animals-nature")
    assert "vampire" in bat["tags"]
    assert images.decode(bat["bytes"]).shape == (128, 128, 3)
    assert sources.EMOJI.stat().st_size < 5e6


def test_folder_lists_images_only_sorted(tmp_path):
    write_folder(
        tmp_path, ["b/2.PNG", "a/1.jpg", "a/x/3.webp", "0.gif", ".hidden.png", ".git/x.png"]
    )
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    source = folders.FolderSource(tmp_path)
    assert names_of(source) == ["0.gif", "a/1.jpg", "a/x/3.webp", "b/2.PNG"]
    assert source.classes == ["a", "b"]
    assert [source[i].get("label", -1) for i in range(4)] == [-1, 0, 0, 1]


def test_folder_follows_links_once(tmp_path):
    write_folder(tmp_path / "elsewhere", ["1.png"])
    root = write_folder(tmp_path / "root", ["a/0.png"])
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "loop").symlink_to(root)
    everything = folders.FolderSource(root, allow_outside=True)
    assert names_of(everything) == ["a/0.png", "linked/1.png"]


def test_folder_holds_out_a_tenth_by_name(tmp_path):
    names = [f"{i:03d}.png" for i in range(200)]
    write_folder(tmp_path, names)
    parts = {s: names_of(folders.FolderSource(tmp_path, s)) for s in ("train", "heldout", "all")}
    assert parts["all"] == names
    assert sorted(parts["train"] + parts["heldout"]) == names
    assert 8 < len(parts["heldout"]) < 36
    assert names_of(folders.FolderSource(tmp_path, "validation")) == parts["heldout"]
    # Adding a picture moves no other between the parts.
    write_folder(tmp_path, ["new.png"])
    assert set(parts["heldout"]) <= set(names_of(folders.FolderSource(tmp_path, "heldout")))


def test_small_folder_holds_out_nothing_and_says_so(tmp_path, caplog):
    write_folder(tmp_path, ["1.png", "2.png"])
    assert len(folders.FolderSource(tmp_path, "train")) == 2
    assert str(tmp_path) not in caplog.text
    assert len(folders.FolderSource(tmp_path, "heldout")) == 2
    assert str(tmp_path) in caplog.text
    assert "figures of split 'heldout' are on training pictures" in caplog.text


def test_folder_of_split_folders(tmp_path):
    write_folder(tmp_path, ["train/cat/1.png", "train/dog/2.png", "val/dog/3.png"])
    train = folders.FolderSource(tmp_path, "train")
    assert (names_of(train), train.classes) == (["cat/1.png", "dog/2.png"], ["cat", "dog"])
    for split in ("val", "heldout"):
        heldout = folders.FolderSource(tmp_path, split)
        assert [heldout[0]["name"], heldout[0]["label"]] == ["dog/3.png", 1]
    assert len(folders.FolderSource(tmp_path, "all")) == 3
    write_folder(tmp_path, ["bus/4.png"])  # now train and val are classes like bus
    assert len(folders.FolderSource(tmp_path, "train")) == 4


def test_folders_without_pictures_beside_splits_do_not_count(tmp_path):
    write_folder(tmp_path, ["train/cat/1.png", "val/cat/2.png"])
    for beside in ("__MACOSX/val/._2.png", "annotations/train.json", "empty/deep/notes.txt"):
        (tmp_path / beside).parent.mkdir(parents=True)
        (tmp_path / beside).write_text("not a picture")
    train = folders.FolderSource(tmp_path, "train")
    assert (names_of(train), train.classes) == (["cat/1.png"], ["cat"])
    assert names_of(folders.FolderSource(tmp_path, "heldout")) == ["cat/2.png"]


def test_splits_taken_as_classes_are_a_warning(tmp_path, caplog):
    write_folder(tmp_path, ["train/1.png", "val/2.png", "bus/3.png"])
    assert folders.FolderSource(tmp_path, "train").classes == ["bus", "train", "val"]
    assert f"{tmp_path}: ['train', 'val'] are taken as classes, not as splits" in caplog.text


@pytest.mark.parametrize(
    ("train", "heldout"),
    [("train2017", "val2017"), ("training", "validation"), ("Train", "Val"), ("train", "valid"),
     ("TRAIN", "dev"), ("train", "test2014"), ("Training2012", "heldout")],
)  # fmt: skip
def test_splits_under_other_usual_names(tmp_path, caplog, train, heldout):
    write_folder(tmp_path, [f"{train}/cat/1.png", f"{train}/dog/2.png", f"{heldout}/dog/3.png"])
    source = folders.FolderSource(tmp_path, "train")
    assert (names_of(source), source.classes) == (["cat/1.png", "dog/2.png"], ["cat", "dog"])
    for split in ("heldout", "val"):
        assert names_of(folders.FolderSource(tmp_path, split)) == ["dog/3.png"]
    assert str(tmp_path) not in caplog.text


def test_each_heldout_split_has_its_folder(tmp_path):
    write_folder(tmp_path, ["train2017/1.png", "val2017/2.png", "test2017/3.png"])
    for split, want in {"val": "2.png", "test": "3.png", "heldout": "2.png"}.items():
        assert names_of(folders.FolderSource(tmp_path, split)) == [want]


def test_folders_that_mean_the_same_split_are_an_error(tmp_path):
    write_folder(tmp_path, ["train/1.png", "val/2.png", "valid/3.png"])
    with pytest.raises(ValueError, match="'val' and 'valid' both mean split 'val'"):
        folders.FolderSource(tmp_path, "train")
    assert len(folders.FolderSource(tmp_path, "all")) == 3


@pytest.mark.parametrize(
    ("names", "warned"),
    [
        (["train2017", "unlabeled2017"], "['train2017'] are taken as classes"),
        (["Train", "Val", "bus"], "['Train', 'Val'] are taken as classes"),
        (["images/train", "images/val"], "['images/train', 'images/val'] are taken as parts"),
        (["images/train2017", "x/a"], "['images/train2017'] are taken as parts"),
        (["Train", "bus"], ""), (["train1", "val1"], ""), (["vehicles/train", "x/a"], ""),
        (["2017", "a2017"], ""),
    ],
)  # fmt: skip
def test_what_looks_like_splits_but_is_not_is_a_warning(tmp_path, caplog, names, warned):
    write_folder(tmp_path, [f"{name}/1.png" for name in names])
    assert len(folders.FolderSource(tmp_path, "train")) == len(names)
    assert f"{tmp_path}: {warned}" in caplog.text if warned else str(tmp_path) not in caplog.text


def test_pictures_beside_splits_are_counted_in_the_log(tmp_path, caplog):
    names = [*(f"{i}.png" for i in range(5)), "train/1.png", "val/2.png"]
    write_folder(tmp_path, names)
    assert names_of(folders.FolderSource(tmp_path, "train")) == ["1.png"]
    assert f"{tmp_path}: 5 pictures are left out, because they lie beside" in caplog.text


def test_folder_with_only_a_train_part_has_no_heldout(tmp_path):
    write_folder(tmp_path, ["train/1.png"])
    with pytest.raises(ValueError, match=r"\['train'\], none of which is split 'heldout'"):
        folders.FolderSource(tmp_path, "heldout")


@pytest.mark.parametrize(
    ("path", "split", "message"),
    [
        ("", "train", "is not a folder of images"),
        ("missing", "train", "is not a folder of images"),
        ("empty", "train", "holds no images: none of its files ends in .jpg"),
        ("empty", "tain", "no split 'tain'"),
    ],
)
def test_folder_errors(tmp_path, monkeypatch, path, split, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        sources.open_source("folder", path, split)


def test_file_that_vanished_is_a_broken_picture(tmp_path):
    source = folders.FolderSource(write_folder(tmp_path, ["1.png"]))
    (tmp_path / "1.png").unlink()
    with pytest.raises(Broken, match="cannot be read"):
        source[0]


def test_unknown_kind_of_source():
    with pytest.raises(
        ValueError, match=r"'imagenet' is not one of \['array_record', 'arrow', 'emoji'"
    ):
        sources.open_source("imagenet", "", "train")


@pytest.mark.parametrize("raw", [True, False])
def test_records_come_back_as_written(tmp_path, raw):
    image = picture(0)
    payload = {"image": image} if raw else {"bytes": encode(image)}
    example = {"name": "ä/1", "label": 3, "caption": "été", "tags": ["a", "b"], **payload}
    back = records.unpack(records.pack(example))
    if raw:
        np.testing.assert_array_equal(back.pop("image"), example.pop("image"))
    assert back == example


@pytest.mark.parametrize(
    "record", [b"", b"TFX1", b"PNG....", b"TFX1\xff\xff\0\0{}", b"TFX1\2\0\0\0[]", b"TFX1\1\0\0\0{"]
)
def test_damaged_records_are_broken_pictures(record):
    with pytest.raises(Broken):
        records.unpack(record)


def test_record_with_wrong_shape_is_a_broken_picture():
    record = records.pack({"name": "x", "image": plain(1)})
    with pytest.raises(Broken, match="damaged record"):
        records.unpack(record[:-1])


def test_pack_wants_one_picture():
    with pytest.raises(ValueError, match="exactly one"):
        records.pack({"name": "x"})
    with pytest.raises(ValueError, match="must be uint8"):
        records.pack({"name": "x", "image": np.zeros((4, 4))})


def write_records(folder, counts, **options):
    with records.DatasetWriter(folder, records_per_file=4, **options) as writer:
        writer.about = {"classes": ["even", "odd"]}
        for split, count in counts.items():
            for i in range(count):
                writer.write(split, {"name": f"{split}/{i}", "label": i % 2, "image": plain(i)})


def test_array_record_splits_files_and_patterns(tmp_path):
    write_records(tmp_path, {"train": 10, "test": 3})
    train = sources.RecordSource(str(tmp_path), "train")
    assert names_of(train) == [f"train/{i}" for i in range(10)]
    assert (train.classes, train.numbers) == (["even", "odd"], ("label",))
    assert len(sources.RecordSource(str(tmp_path), "all")) == 13
    assert len(sources.RecordSource(str(tmp_path / "train-*.array_record"), "train")) == 10
    assert len(list(tmp_path.glob("train-0000?-of-00003.array_record"))) == 3
    with pytest.raises(ValueError, match=r"no split 'heldout'; it has \['train', 'test', 'all'\]"):
        sources.RecordSource(str(tmp_path), "heldout")
    with pytest.raises(ValueError, match=r"names no files; give a folder with dataset.json"):
        sources.RecordSource(str(tmp_path / "nothing-*"), "train")


def test_one_damaged_record_is_one_broken_picture(tmp_path):
    write_records(tmp_path, {"train": 3})
    path = tmp_path / "train-00000-of-00001.array_record"
    data = bytearray(path.read_bytes())
    place = data.index(plain(1).tobytes()[:300])
    data[place + 100] ^= 0xFF
    path.write_bytes(data)
    source = sources.RecordSource(str(tmp_path), "train")
    assert source[0]["name"] == "train/0"
    with pytest.raises(Broken, match="damaged record"):
        source[1]
    assert source[2]["name"] == "train/2"


def test_missing_and_truncated_files_are_named(tmp_path):
    write_records(tmp_path, {"train": 3})
    path = tmp_path / "train-00000-of-00001.array_record"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="missing or damaged"):
        sources.RecordSource(str(tmp_path), "train")
    path.unlink()
    with pytest.raises(ValueError, match="missing or damaged"):
        sources.RecordSource(str(tmp_path), "train")


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """A real TFDS data set, small enough to prepare in a test."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = None

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["even", "odd"]),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), description="tiny"
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(6):
            yield i, {"image": io.BytesIO(encode(plain(40 * i))), "label": i % 2}


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """TinyPictures prepared as ArrayRecord; its version folder."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    builder = TinyPictures(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    return tmp_path / "tiny_pictures" / "1.0.0"


def test_tfds_prepared_data(prepared):
    source = sources.TFDSSource(str(prepared), "train")
    assert (len(source), source.classes, source.numbers) == (6, ["even", "odd"], ("label",))
    for i in range(6):
        example = source[i]
        value = images.decode(example["bytes"])[0, 0, 0]
        assert value // 40 % 2 == example["label"]
    assert len(sources.TFDSSource(str(prepared), "train[:50%]")) == 3
    with pytest.raises(ValueError, match="no split 'validation'"):
        sources.TFDSSource(str(prepared), "validation")


def test_tfds_data_become_records(prepared, tmp_path):
    dst = tmp_path / "records"
    assert prepare.run(["tfds", f"--src={prepared}", f"--dst={dst}"]) == 0
    found, real = (
        sources.open_source(*where, "train")
        for where in (("array_record", str(dst)), ("tfds", str(prepared)))
    )
    assert [found[i] for i in range(6)] == [real[i] for i in range(6)]
    assert found.classes == ["even", "odd"]


def test_tfds_data_of_another_format_names_the_remedy(prepared):
    info = prepared / "dataset_info.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "fileFormat": "tfrecord"}))
    for file in prepared.glob("*array_record*"):
        file.rename(prepared / file.name.replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"prepared as tfrecord.*--file_format=array_record"):
        sources.TFDSSource(str(prepared), "train")


def test_tfds_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"'imagenet2012' is not prepared.*tfds build imagenet"):
        sources.TFDSSource("imagenet2012", "train")
    with pytest.raises(ValueError, match="no_such_data_set"):
        sources.TFDSSource("no_such_data_set", "train")
    with pytest.raises(ValueError, match="no single image"):
        sources.TFDSSource("imdb_reviews", "train")


@pytest.fixture
def mocked_imagenet(monkeypatch):
    """imagenet2012 with made-up JPEGs. TFDS encodes them with TensorFlow; here PIL does."""
    monkeypatch.setattr(
        tfds.core.features.image_feature._ImageEncoder,
        "_encode_image",
        lambda self, image: encode(image, "JPEG"),
    )
    with tfds.testing.mock_data(num_examples=5):
        yield


@pytest.mark.usefixtures("mocked_imagenet")
def test_tfds_imagenet():
    source = sources.open_source("tfds", "imagenet2012", "train")
    assert (len(source), source.numbers, len(source.classes)) == (5, ("label",), 1000)
    example = source[0]
    assert Image.open(io.BytesIO(example["bytes"])).format == "JPEG"
    assert 0 <= example["label"] < 1000


@pytest.mark.parametrize(
    "manifest",
    [
        [], {}, {"splits": 3}, {"splits": []}, {"splits": {}}, {"splits": {"train": 1}},
        {"splits": {"train": {"files": "x"}}}, {"splits": {"train": {"files": [1]}}},
        {"splits": {"train": {"files": ["../secret-00000"]}}},
        {"splits": {"train": {"files": ["/dev/zero"]}}}, {"splits": {"train": {"files": [""]}}},
        {"splits": {"train": {"files": ["train-0\0"]}}}, {"splits": {"train": {"files": ["no"]}}},
        {"splits": {"train": {"files": []}}}, {"splits": {"train": {"files": []}}, "classes": 1},
        {"splits": {"train": {"files": []}}, "classes": [1]},
    ],
)  # fmt: skip
def test_a_wrong_dataset_json_is_one_short_error(tmp_path, manifest):
    write_records(tmp_path / "d", {"train": 2})
    (tmp_path / "d" / "dataset.json").write_text(json.dumps(manifest))
    (tmp_path / "secret-00000").write_bytes(b"x")
    with pytest.raises(ValueError, match=str(tmp_path / "d")) as error:
        sources.RecordSource(str(tmp_path / "d"), "train")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff", b"1" * 5000])
def test_a_dataset_json_that_is_no_json_is_named(tmp_path, content):
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"dataset\.json is not"):
        sources.RecordSource(str(tmp_path), "train")


def test_tfds_rows_of_a_wrong_type_are_broken(prepared, monkeypatch):
    source = sources.TFDSSource(str(prepared), "train")
    good = {"image": b"x", "label": 1}
    for wrong in ({"label": "cat"}, {"label": 2**40}, {"label": None}, {"image": "text"}):
        monkeypatch.setattr(source, "_source", [good | wrong])
        with pytest.raises(Broken, match="damaged record"):
            source[0]


def test_links_within_the_folder_are_followed_from_its_splits(tmp_path):
    write_folder(tmp_path, ["train/1.png", "val/2.png", ".store/3.png"])
    (tmp_path / "train" / "3.png").symlink_to(tmp_path / ".store" / "3.png")
    assert names_of(folders.FolderSource(tmp_path, "train")) == ["1.png", "3.png"]
