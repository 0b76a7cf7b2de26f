"""FID: the distance against the reference's, the streamed sums, the network, the cache."""

import tracemalloc
import zipfile

import numpy as np
import pytest
from golden.loading import GOLDEN, images_uint8
from PIL import Image

from tokenflow_jax.evals import fid_network
from tokenflow_jax.evals.frechet import Statistics, frechet_distance

VECTORS = np.load(GOLDEN / "evals.npz")


@pytest.mark.parametrize(("case", "tolerance"), [("full", 1e-8), ("deficient", 1e-6)])
def test_distance_equals_the_reference(case, tolerance):
    parts = [VECTORS[f"frechet_{case}_{name}"] for name in ("mu1", "sigma1", "mu2", "sigma2")]
    expected = VECTORS[f"frechet_{case}_distance"]
    np.testing.assert_allclose(frechet_distance(*parts), expected, rtol=tolerance)
    np.testing.assert_allclose(frechet_distance(*parts[2:], *parts[:2]), expected, rtol=tolerance)


def test_distance_of_singular_covariances_is_exact():
    """Of commuting covariances sum (sqrt(a) - sqrt(b))^2 is the distance, whatever is zero."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    a, b = np.zeros((2, 40))
    a[:20], b[10:30] = rng.uniform(0.1, 9, (2, 20))
    mean = rng.normal(size=40)
    covariances = [basis @ np.diag(v) @ basis.T for v in (a, b)]
    got = frechet_distance(mean, covariances[0], np.zeros(40), covariances[1])
    expected = mean @ mean + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert frechet_distance(mean, covariances[0], mean, covariances[0]) < 1e-12


def test_streamed_statistics_equal_those_of_the_whole():
    features = np.random.default_rng(1).normal(3, 0.5, (50, 6)).astype(np.float32)
    one, other = Statistics.empty(6), Statistics.empty(6)
    one.update(features[:20])
    other.update(features[20:27])
    other.update(features[27:])
    whole = Statistics(
        one.count + other.count, one.sum_D + other.sum_D, one.outer_DD + other.outer_DD
    )
    exact = features.astype(np.float64)
    np.testing.assert_allclose(whole.mean, exact.mean(0), rtol=1e-14)
    np.testing.assert_allclose(whole.covariance, np.cov(exact, rowvar=False), rtol=1e-11)
    np.testing.assert_allclose(whole.over_processes().outer_DD, exact.T @ exact, rtol=1e-14)


def test_too_few_images_say_so():
    statistics = Statistics.empty(4)
    statistics.update(np.ones((1, 4)))
    with pytest.raises(ValueError, match=r"1 images.*2 or more"):
        _ = statistics.covariance
    assert "singular" in fid_network.caution(5000, 2048) and not fid_network.caution(2049, 5000)


def test_features_equal_the_reference(network):
    images = images_uint8("astronaut_256", "coffee_256")
    features = network.features(images)  # two images of a batch of eight
    golden = np.load(GOLDEN / "inception.npz")["inception_pool3"]
    np.testing.assert_allclose(features, golden, rtol=0, atol=1e-4)


def fingerprint(*parts):
    whole = fid_network.Fingerprint()
    for part in parts:
        whole.update(part)
    return whole.over_processes()


def test_a_fingerprint_names_the_pixels_not_their_order():
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    name = fingerprint(images)
    assert name == fingerprint(images[3:], images[:3])
    changed = images.copy()
    changed[2, 0, 0, 0] ^= 1
    assert name != fingerprint(changed) and name != fingerprint(images[:4])


class Batches:
    """Batches that count how often they are read."""

    def __init__(self, images):
        self.images, self.reads = images, 0

    def __iter__(self):
        self.reads += 1
        yield {"image": self.images, "mask": np.array([True] * (len(self.images) - 1) + [False])}


def test_reference_statistics_are_computed_once_and_kept(network, tmp_path):
    batches = Batches(np.random.default_rng(2).integers(0, 256, (4, 32, 32, 3), np.uint8))
    name = fingerprint(batches.images[:3])
    first = fid_network.Reference(network, batches, tmp_path / "cache", "noise")
    statistics = first.statistics(name)
    assert first.statistics(name) is statistics and batches.reads == 1
    assert statistics.count == 3
    np.testing.assert_allclose(
        statistics.sum_D, network.features(batches.images[:3]).sum(0, np.float64), rtol=1e-6
    )

    (file,) = (tmp_path / "cache").iterdir()
    again = fid_network.Reference(network, batches, tmp_path / "cache").statistics(name)
    assert batches.reads == 1
    np.testing.assert_array_equal(again.outer_DD, statistics.outer_DD)

    other = Batches(255 - batches.images)
    fid_network.Reference(network, other, tmp_path / "cache").statistics(
        fingerprint(other.images[:3])
    )
    assert other.reads == 1 and len(list((tmp_path / "cache").iterdir())) == 2

    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged .*delete the file"):
        fid_network.Reference(network, batches, tmp_path / "cache").statistics(name)


def test_a_checksum_that_does_not_fit_is_found(tmp_path):
    """Statistics that zip's own check would let pass."""
    statistics = Statistics(3, np.ones(2), np.ones((2, 2)))
    fid_network.write_statistics(tmp_path / "a.npz", statistics, {"images": "these"})
    with np.load(tmp_path / "a.npz") as file:
        np.savez(tmp_path / "b.npz", **{**file, "sum": np.ones(2) + 1e-9})
    assert fid_network.read_statistics(tmp_path / "a.npz", {"images": "these"}).count == 3
    for name, images in (("b.npz", "these"), ("a.npz", "others")):
        with pytest.raises(ValueError, match="damaged"):
            fid_network.read_statistics(tmp_path / name, {"images": images})


def test_statistics_that_declare_more_than_they_hold_are_damaged(tmp_path):
    """A header of 2^40 numbers, and members that unpack to gigabytes."""
    about, path = {"images": "these"}, tmp_path / "a.npz"
    fid_network.write_statistics(path, Statistics(3, np.ones(2), np.eye(2)), about)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    large = members["sum.npy"].replace(b"(2,)", b"(1099511627776,)")
    for change, compression in (
        ({"sum.npy": large}, zipfile.ZIP_STORED),
        ({"sum.npy": members["sum.npy"] + bytes(2**28)}, zipfile.ZIP_DEFLATED),
        ({"count.npy": b"\x93NUMPY\1\0\x10\0{'descr': " + b"(" * 99}, zipfile.ZIP_STORED),
        ({"about.npy": b""}, zipfile.ZIP_STORED),
    ):
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in (members | change).items():
                archive.writestr(name, content)
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"a\.npz are damaged"):
            fid_network.read_statistics(path, about)
        assert tracemalloc.get_traced_memory()[1] < 2**26
        tracemalloc.stop()


@pytest.mark.slow
def test_two_folders(command, network, inception_file, tmp_path):
    images = np.random.default_rng(3).integers(0, 256, (6, 20, 20, 3), np.uint8)
    for i, image in enumerate(images):
        folder = tmp_path / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    (tmp_path / "b" / "broken.png").write_bytes(b"no picture")
    arguments = [f"--a={tmp_path / 'a'}", f"--b={tmp_path / 'b'}", f"--inception={inception_file}"]
    code, out, _ = command("tokenflow_jax.evals.fid", *arguments)
    assert code == 0
    sides = [Statistics.empty(2048) for _ in "ab"]
    for i, side in enumerate(sides):
        side.update(network.features(images[i::2]))
    value = float(out.partition("FID ")[2].split()[0])
    np.testing.assert_allclose(value, sides[0].distance(sides[1]), rtol=1e-3)
    for text in ("3 images", "20 px", network.checksum, "singular", "broken.png"):
        assert text in out


def test_wrong_flags_are_one_line(command):
    code, _, errors = command("tokenflow_jax.evals.fid", "--a=x")
    assert code == 2 and errors.count("\n") == 1 and "--b" in errors
