"""The public API: parity with the reference through files, and clear errors."""

import dataclasses
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny as tiny_config
import torch_states
from golden import weights
from golden.loading import GOLDEN, images_uint8, manifest
from PIL import Image

import tokenflow_jax as tfx
from tokenflow_jax.data.images import center_crop
from tokenflow_jax.tokenizer import api, frozen
from tokenflow_jax.tokenizer.model import TokenFlow
from tokenflow_jax.tokenizer.names import PART, tokenizer_buffers, tokenizer_table
from tokenflow_jax.weights import pretrained
from tokenflow_jax.weights.conversion import convert
from tokenflow_jax.weights.formats.safetensors import write_safetensors

# Variant, image size, strides of the stored arrays, tolerance of pixels.
CASES = {
    "clipb_224": ("b", 224, 8, 4, 5e-4),
    "clipb_256_enhanced": ("b_256_enhanced", 256, 8, 4, 5e-4),
    "vitamin_256": ("l", 256, 16, 4, 5e-4),
    "siglip_384": ("xl", 384, 27, 6, 2e-3),
}
TINY = dataclasses.replace(tiny_config.TINY, semantic_channels=32, pixel_channels=8)


@pytest.fixture(scope="module")
def tiny():
    images = np.zeros((1, 16, 16, 3), np.float32)
    params = jax.jit(TokenFlow(TINY).init)(jax.random.key(0), images)["params"]
    return tfx.Tokenizer(TINY, params)


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_reference_parity(case, tmp_path):
    """The files store every n-th row of semantic_recon and every n-th pixel, to stay small."""
    variant, size, rows, pixels, tolerance = CASES[case]
    path = str(tmp_path / "tokenflow.safetensors")
    write_safetensors(path, weights.state_dict(manifest(f"tokenizer_{case}"), 0))
    tokenizer = tfx.Tokenizer.load(path, variant=variant)
    stored = np.load(GOLDEN / f"tokenizer_{case}.npz")
    codes = np.asarray(tokenizer.encode(images_uint8(f"astronaut_{size}", f"coffee_{size}")))
    np.testing.assert_array_equal(codes, stored["indices"])

    count, channels, *grid = stored["quantized"].shape
    maps = np.asarray(tokenizer.features(codes[:count]))
    quantized = maps.transpose(0, 2, 1).reshape(count, channels, *grid)
    np.testing.assert_allclose(quantized, stored["quantized"], rtol=0, atol=2e-5)
    semantics = np.asarray(tokenizer.semantics(codes[:1]))[0]
    np.testing.assert_allclose(semantics[::rows], stored["semantic_recon"], rtol=0, atol=1e-4)

    (partial,) = (name for name in stored.files if name.startswith("recon_partial_"))
    tokens = tokenizer.config.pyramid.slices()[int(partial.rsplit("_", 1)[1]) - 1].stop
    for name, count in (("recon", codes.shape[1]), (partial, tokens)):
        image = np.asarray(tokenizer.decode(codes[:1, :count]))[0].transpose(2, 0, 1)
        shown = image[:, ::pixels, ::pixels]
        np.testing.assert_allclose(shown, stored[name], rtol=0, atol=tolerance)


def test_images_to_codes_and_back(tiny, pictures):
    codes = tiny.encode(pictures)
    assert codes.shape == (2, 21) and codes.dtype == np.int32
    assert tiny.decode(codes).shape == (2, 16, 16, 3)
    assert tiny.decode(np.asarray(codes)[:, :5]).shape == (2, 16, 16, 3)
    assert tiny.features(codes).shape == (2, 16, 40)
    assert tiny.semantics(codes).shape == (2, 16, 10)


def test_uint8_and_float_are_the_same_picture(tiny, pictures):
    as_float = pictures.astype(np.float32) / 127.5 - 1
    np.testing.assert_array_equal(tiny.encode(pictures), tiny.encode(as_float))


def test_floats_have_the_range_that_is_named(tiny, pictures):
    codes, unit = tiny.encode(pictures), pictures.astype(np.float32) / 255
    agree = np.asarray(tiny.encode(unit, value_range=(0, 1)) == codes).mean()
    assert agree > 0.99  # 2 * (x / 255) - 1 rounds differently from x / 127.5 - 1
    assert np.asarray(tiny.encode(unit, value_range=(-1, 1)) == codes).mean() < 0.9
    with pytest.raises(ValueError, match=r"not \[0, 1\]"):
        tiny.encode(2 * unit - 1, value_range=(0, 1))
    with pytest.raises(ValueError, match="value_range"):
        tiny.encode(unit, value_range=(0, 255))


def test_nothing_recompiles_for_the_same_shape(tiny, pictures):
    tiny.encode(pictures)
    size = tiny.compiled["encode"]._cache_size()
    tiny.encode(pictures[::-1])
    assert tiny.compiled["encode"]._cache_size() == size


@pytest.mark.parametrize(
    "images,message",
    [
        (
            np.zeros((1, 20, 20, 3), np.float32) - 0.5,
            r"20.*floats are not resized; .*\(16, 16, 3\)",
        ),
        (np.zeros((16, 16), np.uint8), r"shape \(16, 16\).*give uint8 \(height, width, 3\)"),
        (np.zeros((2, 3, 16, 16), np.uint8), r"channels come last.*transpose\(0, 2, 3, 1\)"),
        (np.zeros((3, 16, 16), np.float32), r"channels come last.*transpose\(1, 2, 0\)"),
        (np.zeros((2, 16, 16, 4), np.uint8), r"shape \(2, 16, 16, 4\).*give"),
        (np.zeros((2, 16, 16, 3), object), "dtype object: give pictures .* as a list"),
        (np.full((1, 16, 16, 3), 200.0), r"span 200 to 200.*give uint8"),
        (np.full((1, 16, 16, 3), np.nan, np.float32), r"not \[-1, 1\]"),
        (np.zeros((1, 16, 16, 3), np.int64), "dtype int64"),
        (np.full((1, 16, 16, 3), 0.5, np.float32), r"say value_range=\(0, 1\)"),
    ],
)
def test_bad_images(tiny, images, message):
    with pytest.raises(ValueError, match=message):
        tiny.encode(images)


@pytest.mark.parametrize(
    "codes,message",
    [
        (np.zeros((1, 7), int), r"7 codes .* one of \[1, 5, 21\]"),
        (np.full((1, 21), 32), "this codebook has 0 to 31"),
        (np.full((1, 21), -1), "span -1"),
        (np.zeros((1, 21)), "give integers"),
        (np.zeros(21, int), "give integers of shape"),
    ],
)
def test_bad_codes(tiny, codes, message):
    with pytest.raises(ValueError, match=message):
        tiny.decode(codes)


def test_scales_and_weight_of_a_pytorch_file_can_be_given(tiny, tmp_path, monkeypatch):
    """They override the variant of a PyTorch file; checkpoints of ours know theirs."""
    monkeypatch.setitem(frozen.VARIANTS, "tiny", TINY)
    path = tmp_path / "tiny.safetensors"
    buffers = tokenizer_buffers(TINY)
    write_safetensors(path, torch_states.to_torch(tiny.params, tokenizer_table(TINY), buffers))
    loaded = tfx.Tokenizer.load(path, variant="tiny", scales=(2, 4), pixel_weight=3.0)
    assert (loaded.config.scales, loaded.config.pixel_weight) == ((2, 4), 3.0)
    assert tfx.Tokenizer.load(path, variant="tiny").config == TINY
    with pytest.raises(ValueError, match=r"scales \(1, 2\) end at 2"):
        tfx.Tokenizer.load(path, variant="tiny", scales=(1, 2))
    convert(path, tmp_path / "ours", PART, TINY)
    with pytest.raises(ValueError, match="knows its own scales"):
        tfx.Tokenizer.load(tmp_path / "ours", scales=(2, 4))
    with pytest.raises(ValueError, match=r"ours is a checkpoint of ours.*got 'tinny'"):
        tfx.Tokenizer.load(tmp_path / "ours", variant="tinny")


def test_loading_says_what_is_wrong(tmp_path):
    path = tmp_path / "some.safetensors"
    write_safetensors(str(path), {"encoder.conv_in.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(ValueError, match=r"variant=one of \['b', 'b_256'"):
        tfx.Tokenizer.load(path)
    with pytest.raises(ValueError, match=r"decoder\.conv_in\.weight"):
        tfx.Tokenizer.load(path, variant="b")
    with pytest.raises(ValueError, match=r"nowhere"):
        tfx.Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="float16"):
        tfx.Tokenizer.load(path, variant="b", dtype="float16")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no images: the list is empty"),
        (iter([]), "no images"),
        ([[1]], r"picture 0 is \[1\]: give a PIL image, a path"),
        ("x.png", r"picture 'x\.png': cannot be read"),
        ("https://host/x.png", "an address: fetch it first"),
        (None, "images are None: give a PIL image"),
        (3.0, "images are 3.0"),
        ({"a": 1}, "images are {'a': 1}"),
        ([np.zeros((16, 16, 3), np.uint8), b"GIF8"], "picture 1 <class 'bytes'>: "),
        ([np.zeros((3, 16, 16), np.uint8)], "picture 0 of shape .*channels come last"),
        ([np.zeros((1, 16, 16, 3), np.uint8)], r"picture 0 of shape .*give \(height, width, 3\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), "picture 0: too small"),
    ],
)
def test_what_is_no_image_is_named(tiny, images, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny.encode(images)
    assert "\n" not in str(error.value)


def test_an_empty_batch_is_refused(tiny):
    size = tiny.config.image_size
    with pytest.raises(ValueError, match=r"images of shape \(0, "):
        tiny.encode(np.zeros((0, size, size, 3), np.uint8))


class Tensor:
    """An array of another library, such as a tensor of PyTorch on the CPU."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def __array__(self, dtype=None, copy=None):
        return self.array


@pytest.fixture
def kinds(tmp_path):
    """The same picture, 30 x 24, in every kind that is taken, and what evaluation makes of it."""
    array = np.random.default_rng(1).integers(0, 256, (24, 30, 3), np.uint8)
    image, path = Image.fromarray(array), tmp_path / "a.png"
    image.save(path)
    rgba = Image.fromarray(np.dstack([array, np.full((24, 30), 255, np.uint8)]))
    kinds = [image, path, str(path), path.read_bytes(), bytearray(path.read_bytes()), array,
             jnp.asarray(array), Tensor(array), rgba, Image.open(path)]  # fmt: skip
    return kinds, center_crop(array, 16)


def test_one_picture_of_any_kind(tiny, kinds):
    """Its codes are those of the crop that evaluation makes, in a batch of one."""
    kinds, cropped = kinds
    expected = np.asarray(tiny.encode(cropped[None]))
    for kind in [*kinds, io.BytesIO(kinds[3])]:  # the last one is an open file
        codes = tiny.encode(kind)
        assert codes.shape == (1, 21)
        np.testing.assert_array_equal(codes, expected)
    with pytest.raises(ValueError, match="30 x 24 pixels, the model takes 16 x 16"):
        tiny.encode(kinds[0], resize=False)
    np.testing.assert_array_equal(tiny.encode(cropped, resize=False), expected)


def test_any_number_streams_in_batches_of_one_program(tiny, kinds, pictures):
    """Lists and generators mix kinds and sizes; no more is read than a few batches."""
    kinds, _ = kinds
    mixed = [*kinds, *pictures, pictures[0] / np.float32(127.5) - 1]
    expected = [np.asarray(tiny.encode(one))[0] for one in mixed]
    taken = []

    def stream():
        for one in mixed:
            taken.append(len(steps))
            yield one

    steps, run = [], tiny.compiled["encode"]
    tiny.compiled["encode"] = lambda *arrays: steps.append(arrays[1].shape) or run(*arrays)
    try:
        codes = tiny.encode(stream(), batch_size=5)
    finally:
        tiny.compiled["encode"] = run
    np.testing.assert_array_equal(codes, expected)
    assert steps == [(5, 16, 16, 3)] * 3
    assert taken == [0] * 5 + [1] * 5 + [2] * 3
    array = np.concatenate([pictures, pictures, pictures[:1]])
    np.testing.assert_array_equal(tiny.encode(array, batch_size=2), tiny.encode(array))
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
        tiny.encode(array, batch_size=0)


def test_the_range_of_a_batch_is_that_of_all_its_pictures(tiny, pictures):
    """A bright one is no reason to ask; alone it is."""
    batch = pictures.astype(np.float32) / 127.5 - 1
    batch[1] = np.abs(batch[1])
    codes = tiny.encode(batch)
    np.testing.assert_array_equal(tiny.encode(batch, batch_size=1), codes)
    with pytest.raises(ValueError, match=r"picture 1: .*say value_range"):
        tiny.encode(list(batch))


def test_pictures_come_back_as_pil(tiny, kinds):
    kinds, _ = kinds
    codes = tiny.encode(kinds[:3])
    made = tiny.to_images(codes, batch_size=2)
    expected = np.clip(127.5 * np.asarray(tiny.decode(codes)) + 128, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(np.stack(made), expected)
    single, several = tiny.reconstruct(kinds[0]), tiny.reconstruct([kinds[0]])
    assert isinstance(single, Image.Image) and isinstance(several, list)
    np.testing.assert_array_equal(single, expected[0])
    np.testing.assert_array_equal(several[0], expected[0])
    blurry = tiny.reconstruct(kinds[0], scales=2)
    np.testing.assert_array_equal(blurry, tiny.to_images(codes[:1, :5])[0])
    for scales in (0, 4):
        with pytest.raises(ValueError, match=f"scales={scales}: this tokenizer has 1 to 3"):
            tiny.reconstruct(kinds[0], scales=scales)


def test_pure_functions_for_jit(tiny, pictures):
    """They equal the methods under jit with a sharding and under vmap."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), "data")
    places = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    encode = jax.jit(tiny.encode_fn, in_shardings=(None, places), out_shardings=places)
    codes = encode(tiny.params, pictures)
    assert codes.sharding == places
    np.testing.assert_array_equal(codes, tiny.encode(pictures))
    every = jax.jit(jax.vmap(lambda image: tiny.encode_fn(tiny.params, image[None])[0]))
    np.testing.assert_array_equal(every(pictures), codes)
    codes = np.asarray(codes)
    for part in (codes, codes[:, :5]):
        decoded = jax.jit(tiny.decode_fn)(tiny.params, part)
        np.testing.assert_allclose(decoded, tiny.decode(part), atol=1e-5)
    features = jax.jit(tiny.features_fn)(tiny.params, codes)
    np.testing.assert_allclose(features, tiny.features(codes), atol=1e-6)


def test_repr_is_short_and_dir_knows_the_public_names(tiny):
    assert 1 <= len(repr(tiny).splitlines()) <= 3 and "21 codes of 32" in repr(tiny)
    assert set(tfx.__all__) <= set(dir(tfx))


def test_a_saved_tokenizer_is_loaded_bit_for_bit(tiny, pictures, tmp_path, monkeypatch):
    """Also in shards; an interrupted write leaves nothing."""
    tiny.save_pretrained(tmp_path / "mine")
    save_folder = functools.partial(pretrained.save_folder, shard_bytes=3000)
    monkeypatch.setattr(api, "save_folder", save_folder)
    tiny.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    for name in ("mine", "mine/model.safetensors", "shards", "shards/model.safetensors.index.json"):
        loaded = tfx.Tokenizer.from_pretrained(tmp_path / name)
        assert loaded.config == TINY
        jax.tree.map(np.testing.assert_array_equal, loaded.params, tiny.params)
    np.testing.assert_array_equal(loaded.encode(pictures), tiny.encode(pictures))
    with pytest.raises(FileExistsError, match="mine exists"):
        tiny.save_pretrained(tmp_path / "mine")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(pretrained, "write_card", full)
    with pytest.raises(OSError, match="free some space"):
        tiny.save_pretrained(tmp_path / "mine", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "shards"]
    assert tfx.Tokenizer.load(tmp_path / "mine").config == TINY
