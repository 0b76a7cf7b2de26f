"""Insertion of image vectors: the reference's merged labels, masks and positions."""

import pathlib

import numpy as np
import pytest

from tokenflow_jax.data.chat import insertion
from tokenflow_jax.understanding.model import positions_in

FORWARD = pathlib.Path(__file__).parents[2] / "golden" / "i2t_qwen.forward.npz"
VECTORS = 49


@pytest.fixture(scope="module")
def golden():
    with np.load(FORWARD) as file:
        return {name: file[name] for name in file.files}


def merged(golden, *, prefix="", vectors=VECTORS, length=113, max_length=None, side="right"):
    rows = []
    for i in range(3):
        real = golden["attention_mask"][i] if not prefix else slice(None)
        ids, labels = (golden[f"{prefix}{n}"][i][real] for n in ("input_ids", "labels"))
        counts = vectors if isinstance(vectors, int) else vectors[i]
        rows.append(insertion.merge_row(ids, labels, counts, max_length))
    return insertion.pad_rows(rows, length, side)


@pytest.mark.parametrize(
    "prefix, options",
    [("", {}), ("truncate60:", {"length": 60, "max_length": 60}), ("left:", {"side": "left"})],
)
def test_equals_the_reference(golden, prefix, options):
    rows = merged(golden, **options)
    np.testing.assert_array_equal(rows["labels"], golden[f"{prefix}merged_labels"])
    np.testing.assert_array_equal(rows["segments"], golden[f"{prefix}merged_attention_mask"])
    positions = positions_in(rows["segments"])
    np.testing.assert_array_equal(positions, golden[f"{prefix}merged_position_ids"])


def test_a_list_of_images_at_one_marker(golden):
    counts = [[VECTORS * int(n)] for n in golden["list:images_per_sample"]]
    for i, ids in enumerate(golden["list:input_ids"]):
        counts[i] *= int((ids == -200).sum())
    rows = []
    for i, (ids, labels) in enumerate(
        zip(golden["list:input_ids"], golden["list:labels"], strict=True)
    ):
        real = np.arange(len(ids)) < golden["list:merged_attention_mask"][i].sum() - sum(
            n - 1 for n in counts[i]
        )
        rows.append(insertion.merge_row(ids[real], labels[real], counts[i]))
    batch = insertion.pad_rows(rows, 113)
    np.testing.assert_array_equal(batch["labels"], golden["list:merged_labels"])
    np.testing.assert_array_equal(batch["segments"], golden["list:merged_attention_mask"])


def test_the_example_of_the_docstring():
    row = insertion.merge_row(np.array([5, -200, 7, 9]), None, 3)
    batch = insertion.pad_rows([row, {}], 8)
    assert batch["ids"][0].tolist() == [5, 0, 0, 0, 7, 9, 0, 0]
    assert batch["places"][0].tolist() == [-1, 0, 1, 2, -1, -1, -1, -1]
    assert positions_in(batch["segments"])[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    assert batch["segments"].tolist() == [[1, 1, 1, 1, 1, 1, 0, 0], [0] * 8]
    assert insertion.merged_length(np.array([5, -200, 7, 9]), 3) == 6


def test_conversations_that_share_a_row():
    """The second is left out, the third has the row's third image; positions start from 0."""
    first = insertion.merge_row(np.array([5, -200, 7]), np.array([5, -100, 7]), 2)
    third = insertion.merge_row(np.array([8, -200]), np.array([8, -100]), 2)
    joint = insertion.join_rows([first, {}, third], 2)
    batch = insertion.pad_rows([joint, insertion.join_rows([{}], 2)], 8)
    assert batch["ids"][0].tolist() == [5, 0, 0, 7, 8, 0, 0, 0]
    assert batch["places"][0].tolist() == [-1, 0, 1, -1, -1, 4, 5, -1]
    assert batch["segments"][0].tolist() == [1, 1, 1, 1, 3, 3, 3, 0]
    assert positions_in(batch["segments"])[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert batch["labels"][0].tolist() == [-100, -100, -100, 7, -100, -100, -100, -100]
    assert first["labels"][0] == 5, "the argument was changed"
    assert not batch["segments"][1].any()


def test_wrong_numbers():
    with pytest.raises(ValueError, match="2 image markers"):
        insertion.merge_row(np.array([-200, -200]), None, [3])
    row = insertion.merge_row(np.array([1, 2, 3]), None, 3)
    with pytest.raises(ValueError, match="does not fit"):
        insertion.pad_rows([row], 2)
    with pytest.raises(ValueError, match="side"):
        insertion.pad_rows([row], 4, "top")
    assert [insertion.bucket_for(n, (4, 8)) for n in (1, 4, 5, 99)] == [4, 4, 8, 8]
