"""Checkpoints: round trip, weights only, and every way in which one may not fit."""

import json
import resource
import shutil
import signal

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from late_writer import writing
from read_weights import load_for_inference

from tokenflow_jax import files
from tokenflow_jax.train import checkpoint, checkpoint_info, run_config


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    ema: dict | None
    opt_state: optax.OptState


class Position:
    """The part of the data iterator that checkpoints see."""

    def __init__(self, position=0):
        self.position = {"next": position}

    def get_state(self):
        return self.position

    def set_state(self, positions):
        (self.position,) = positions


CONFIG = {"model": {"width": 4, "scales": [1, 2]}, "seed": 0}


def make_state(width=4, ema=True, extra=False):
    params = {
        "encoder": {"kernel": jnp.arange(3.0 * width).reshape(3, width), "bias": jnp.ones(width)},
        "codebook": jnp.linspace(-1, 1, 8).astype(jnp.bfloat16).reshape(4, 2),
        **({"extra": jnp.zeros(())} if extra else {}),
    }
    mask = jax.tree.map(lambda x: x.ndim == 2, params)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), mask))
    state = State(jnp.int32(7), params, params if ema else None, optimizer.init(params))
    return jax.tree.map(jnp.copy, state)


def save(workdir, state, step=7, position=5, keep=2):
    checkpoints = checkpoint.Checkpoints(workdir, keep)
    checkpoints.save(step, state, Position(position), CONFIG)
    checkpoints.wait()
    return checkpoints


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_round_trip_of_state_data_and_config(tmp_path):
    state = make_state()
    save(tmp_path, state).close()
    checkpoints = checkpoint.Checkpoints(tmp_path)
    assert checkpoints.latest_step() == 7
    position = Position()
    restored = checkpoints.restore(7, jax.tree.map(jnp.zeros_like, state), position)
    assert_same(restored, state)
    assert position.position == {"next": 5}
    assert checkpoints.read_info(7)["config"] == CONFIG
    checkpoints.close()


def test_only_the_latest_stay(tmp_path):
    state = make_state()
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state, Position(), CONFIG)
    checkpoints.wait()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    checkpoints.close()


def test_saved_arrays_do_not_change_with_a_donated_state(tmp_path):
    """The next step writes over the state's memory; what was saved must not follow."""
    update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = update(make_state())
    expected = jax.tree.map(lambda x: np.array(x, copy=True), state)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, state, Position(), CONFIG)
    for _ in range(3):
        state = update(state)
    checkpoints.wait()
    restored = checkpoints.restore(1, state, Position())
    assert_same(jax.tree.map(np.asarray, restored), expected)
    checkpoints.close()


def test_temporary_directories_of_a_killed_save_are_ignored_and_removed(tmp_path):
    save(tmp_path, make_state()).close()
    left = [tmp_path / "checkpoints" / f"{step}.orbax-checkpoint-tmp" for step in (8, 9)]
    (left[0] / "state").mkdir(parents=True)
    left[1].mkdir()
    checkpoints = checkpoint.Checkpoints(tmp_path)
    assert checkpoints.latest_step() == 7
    assert not any(path.exists() for path in left)
    checkpoints.save(9, make_state(), Position(), CONFIG)
    assert checkpoints.latest_step() == 9
    checkpoints.close()


def test_every_array_that_does_not_fit_is_listed(tmp_path):
    checkpoints = save(tmp_path, make_state())
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoints.restore(7, make_state(width=5, ema=False, extra=True), Position())
    message = str(caught.value)
    assert "params/encoder/kernel is float32[3, 4] in the checkpoint and float32[3, 5] here" in (
        message
    )
    assert "params/extra float32[] is not in the checkpoint" in message
    assert "ema/codebook bfloat16[4, 2] is only in the checkpoint" in message
    assert "another --workdir" in message
    checkpoints.close()


def flip_a_byte(checkpoint_path, array):
    """Damages a stored array: a bit of its own bytes, or of the largest file if those are packed.

    Returns:
      Whether it was the array's own.
    """
    needle = np.asarray(array).tobytes()[4000:4008]
    files = [p for p in (checkpoint_path / "state").rglob("*") if p.is_file()]
    for path in files:
        data = bytearray(path.read_bytes())
        at = bytes(data).find(needle)
        if at >= 0:
            data[at] ^= 1
            path.write_bytes(data)
            return True
    path = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return False


@pytest.mark.parametrize("earlier", [False, True])
def test_one_flipped_byte_is_found(tmp_path, earlier):
    state = make_state()
    state = state.replace(params={"noise": jax.random.normal(jax.random.key(0), (64, 64))})
    checkpoints = save(tmp_path, state, step=6 if earlier else 7)
    if earlier:
        checkpoints.save(7, state, Position(), CONFIG)
        checkpoints.wait()
    path = tmp_path / "checkpoints" / "7"
    own = flip_a_byte(path, state.params["noise"])
    with pytest.raises(checkpoint.CheckpointError, match="damaged") as caught:
        checkpoints.restore(7, state, Position())
    message = str(caught.value)
    # Orbax itself notices damage in a compressed chunk only, and names the array as well.
    assert "noise" in message or not own
    if earlier:
        assert f"The checkpoint before it is {path.parent / '6'}: remove {path}" in message
        assert_same(checkpoints.restore(6, state, Position()), state)
    else:
        assert "no earlier checkpoint" in message
    checkpoints.close()


def test_numbers_changed_without_a_broken_file_are_found(tmp_path):
    """As when an array was written from memory that something had overwritten."""
    state = make_state()
    checkpoints = save(tmp_path, state)
    file = tmp_path / "checkpoints" / "7" / "info" / "metadata"
    info = json.loads(file.read_text())
    info["arrays"]["params/encoder/bias"]["sum32"] ^= 1
    del info["crc32"]
    file.write_text(json.dumps(checkpoint_info.seal(info)))
    with pytest.raises(checkpoint.CheckpointError, match=r"differ from those saved in:\n.*bias"):
        checkpoints.restore(7, state, Position())
    checkpoints.close()


def test_a_checkpoint_of_an_older_format_is_explained(tmp_path):
    checkpoints = save(tmp_path, make_state())
    file = tmp_path / "checkpoints" / "7" / "info" / "metadata"
    info = json.loads(file.read_text()) | {"format": 1}
    del info["crc32"]
    file.write_text(json.dumps(info))
    reason = r"has format 1, this version reads \(2, 3\)"
    with pytest.raises(checkpoint.CheckpointError, match=reason):
        checkpoints.restore(7, make_state(), Position())
    checkpoints.close()


@pytest.mark.filterwarnings("ignore:.*:pytest.PytestUnraisableExceptionWarning")  # TensorStore's
def test_a_full_disk_is_explained_and_leaves_the_earlier_checkpoint(tmp_path):
    """A limit on file size stands for the full disk: the kernel refuses the write likewise."""
    state = make_state()
    big = state.replace(params={"w": jax.random.normal(jax.random.key(0), (1024, 1024))})
    checkpoints = save(tmp_path, big)
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, previous[1]))
        with pytest.raises(checkpoint.CheckpointError) as caught:
            checkpoints.save(8, big, Position(), CONFIG)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
        signal.signal(signal.SIGXFSZ, handler)
    message = str(caught.value)
    assert "could not be written" in message and "Free some space" in message
    assert str(tmp_path / "checkpoints" / "7") in message
    again = checkpoint.Checkpoints(tmp_path)
    assert again.latest_step() == 7
    assert_same(again.restore(7, big, Position()), big)
    again.close()


def test_opening_waits_for_the_writers_of_a_failed_save(tmp_path):
    save(tmp_path, make_state()).close()
    unfinished = tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp"
    with writing(unfinished / "state", 1.0):
        checkpoints = checkpoint.Checkpoints(tmp_path)
    assert checkpoints.latest_step() == 7
    assert not unfinished.exists()
    checkpoints.close()


def test_an_unfinished_checkpoint_that_is_written_forever_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PATIENCE_S", 0.3)
    unfinished = tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp"
    reason = r"8\.orbax-checkpoint-tmp cannot be removed \(something keeps writing there\)"
    with writing(unfinished, 2.0), pytest.raises(checkpoint.CheckpointError, match=reason):
        checkpoint.Checkpoints(tmp_path)


@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/7"])
def test_weights_alone_can_be_read_from_any_level(tmp_path, below):
    state = make_state()
    save(tmp_path, state).close()
    config, loaded = load_for_inference(tmp_path / below)
    assert config == CONFIG
    assert loaded["step"] == 7
    assert set(loaded) == {"params", "ema", "step"}
    assert_same(loaded["params"], jax.tree.map(np.asarray, state.params))
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(loaded["params"]))


def test_weights_without_ema_and_by_step(tmp_path):
    checkpoints = save(tmp_path, make_state(ema=False), step=3)
    checkpoints.save(4, make_state(ema=False), Position(), CONFIG)
    checkpoints.close()
    _, loaded = load_for_inference(tmp_path, step=3)
    assert set(loaded) == {"params", "step"} and loaded["step"] == 3
    with pytest.raises(checkpoint.CheckpointError, match=r"has the steps \[3, 4\] \(step 5"):
        load_for_inference(tmp_path, step=5)


def test_a_place_without_checkpoints_is_named(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="holds no checkpoint"):
        load_for_inference(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="holds no checkpoint"):
        load_for_inference(tmp_path / "absent")


def test_config_becomes_plain_and_differences_are_found():
    config = ml_collections.ConfigDict({"scales": (1, 2), "model": {"dim": 4}, "path": None})
    plain = run_config.config_to_dict(config)
    assert plain == {"scales": [1, 2], "model": {"dim": 4}, "path": None}
    other = {"scales": [1, 2], "model": {"dim": 5, "depth": 1}, "path": None}
    assert run_config.config_differences(plain, other) == {
        "model.dim": (4, 5),
        "model.depth": (None, 1),
    }


def flips(data):
    """Returns copies of bytes with one bit changed, all over them."""
    for at in range(0, len(data), max(1, len(data) // 400)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        yield bytes(changed)


def test_every_changed_bit_of_the_info_item_is_found(tmp_path):
    """Of config, data position, averages, arrays' names and of the checksum itself."""
    save(tmp_path, make_state()).close()
    path = tmp_path / "checkpoints" / "7"
    file = path / "info" / "metadata"
    good, silent = file.read_bytes(), []
    saved = checkpoint_info.read_info(path)
    for damaged in flips(good):
        file.write_bytes(damaged)
        try:
            if checkpoint_info.read_info(path) != saved:
                silent.append(damaged)
        except checkpoint.CheckpointError as error:
            assert str(path) in str(error) and len(str(error)) < 1500
    assert not silent


def test_a_checkpoint_of_before_the_checksum_is_read(tmp_path):
    save(tmp_path, make_state()).close()
    file = tmp_path / "checkpoints" / "7" / "info" / "metadata"
    info = json.loads(file.read_text())
    for name in ("crc32", "step", "averages"):
        del info[name]
    file.write_text(json.dumps(info | {"format": 2}))
    checkpoints = checkpoint.Checkpoints(tmp_path)
    assert_same(checkpoints.restore(7, make_state(), Position()), make_state())
    checkpoints.close()
    assert load_for_inference(tmp_path)[1]["step"] == 7


BAD_NAMES = ["a[1]", "a*", "a?b", "a\\b", "a\nb", "caf\udce9", "gs:"]


@pytest.mark.parametrize("name", BAD_NAMES, ids=map(ascii, BAD_NAMES))
def test_a_workdir_that_orbax_misreads_is_refused_at_the_start(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="cannot be kept in") as caught:
        checkpoint.Checkpoints(f"{tmp_path}/{name}")
    str(caught.value).encode()
    assert not list(tmp_path.iterdir())
    (tmp_path / "a[b").mkdir()
    monkeypatch.chdir(tmp_path / "a[b")  # a relative path counts with all above it
    with pytest.raises(checkpoint.CheckpointError, match="cannot be kept in"):
        checkpoint.Checkpoints("run")


@pytest.mark.parametrize("name", ["a#b", "a%b", "x%41", "a|b", "a{b}", "a b", "ä&=;$", "a:b", "~"])
def test_other_workdirs_are_written_and_read_back(tmp_path, name):
    """Also beside one whose name is this one's, taken for a URL."""
    other = make_state().replace(params={"w": jnp.full(3, 9.0)})
    save(tmp_path / "xA", other).close()
    save(tmp_path / name, make_state()).close()
    checkpoints = checkpoint.Checkpoints(tmp_path / name)
    assert_same(checkpoints.restore(7, make_state(), Position()), make_state())
    checkpoints.close()
    _, loaded = load_for_inference(tmp_path / name)
    assert_same(loaded["params"], jax.tree.map(np.asarray, make_state().params))


def remove(*parts):
    def change(path):
        item = path.joinpath(*parts)
        shutil.rmtree(item) if item.is_dir() else item.unlink()

    return change


def write(text, *parts):
    return lambda path: path.joinpath(*parts).write_text(text)


DAMAGE = {
    "no info": remove("info"),
    "no metadata": remove("info", "metadata"),
    "no state": remove("state"),
    "no manifest": remove("state", "manifest.ocdbt"),
    "deep metadata": write("[" * 100_000, "state", "_METADATA"),
    "list for metadata": write("[]", "state", "_METADATA"),
    "deep info": write("[" * 100_000, "info", "metadata"),
    "list for info": write("[]", "info", "metadata"),
    "text for info": write('"text"', "info", "metadata"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_any_damage_offers_the_checkpoint_before(tmp_path, damage):
    save(tmp_path, make_state(), step=6).close()
    save(tmp_path, make_state()).close()
    path = tmp_path / "checkpoints" / "7"
    damage(path)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoints = checkpoint.Checkpoints(tmp_path)
        checkpoints.restore(checkpoints.latest_step(), make_state(), Position())
    assert f"The checkpoint before it is {path.parent / '6'}: remove {path}" in str(caught.value)
    assert len(str(caught.value)) < 1500
    shutil.rmtree(path)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    assert_same(checkpoints.restore(6, make_state(), Position()), make_state())
    checkpoints.close()


def test_other_names_beside_the_checkpoints_do_not_matter(tmp_path):
    save(tmp_path, make_state()).close()
    root = tmp_path / "checkpoints"
    shutil.copytree(root / "7", root / "best")
    shutil.copytree(root / "7", root / "0009")
    shutil.copytree(root / "7", root / "٩")  # a digit, to Python
    (root / "²").mkdir()
    (root / "99").write_text("a file")
    checkpoints = checkpoint.Checkpoints(tmp_path)
    assert checkpoints.latest_step() == 7
    for step in (8, 9):
        checkpoints.save(step, make_state(), Position(), CONFIG)
    checkpoints.close()
    left = sorted(path.name for path in root.iterdir())
    assert left == sorted(["8", "9", "best", "0009", "٩", "²", "99"])
    assert load_for_inference(root / "best")[1]["step"] == 7
    assert load_for_inference(tmp_path)[1]["step"] == 9


def test_an_empty_or_copied_newer_folder_is_named(tmp_path):
    save(tmp_path, make_state()).close()
    root = tmp_path / "checkpoints"
    (root / "99").mkdir()
    with pytest.raises(
        checkpoint.CheckpointError, match=r"99 is no complete checkpoint\n.*/7: rem"
    ):
        checkpoint.Checkpoints(tmp_path)
    (root / "99").rmdir()
    shutil.copytree(root / "7", root / "99")
    checkpoints = checkpoint.Checkpoints(tmp_path)
    with pytest.raises(
        checkpoint.CheckpointError, match="99 is a copy of the checkpoint of step 7"
    ):
        checkpoints.restore(99, make_state(), Position())
    checkpoints.close()


@pytest.mark.parametrize(
    ("shape", "error"),
    [
        ([2**20, 2**20], "declares 4,398,046,511,.* bytes of arrays in"),
        ([3, 5], "kernel cannot be"),
    ],
)
def test_declared_shapes_are_compared_with_the_files(tmp_path, shape, error):
    save(tmp_path, make_state()).close()
    file = tmp_path / "checkpoints" / "7" / "info" / "metadata"
    info = json.loads(file.read_text())
    del info["crc32"]
    info["arrays"]["params/encoder/kernel"]["shape"] = shape
    file.write_text(json.dumps(checkpoint_info.seal(info)))
    with pytest.raises(checkpoint.CheckpointError, match=error):
        load_for_inference(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("tokenizer", 5), ("tokenizer", None), ("data", []), ("sampling", "x"), ("model", None),
     ("text_tokenizer", 5), ("text_tokenizer", True), ("data", {"max_length": "x"}),
     ("data", {"template": {}}), ("tokenizer", {"path": 5}), ("tokenizer", {"fingerprint": []})],
    ids=str,
)  # fmt: skip
def test_a_config_of_other_types_is_named(tmp_path, key, value):
    save(tmp_path, make_state()).close()
    path = tmp_path / "checkpoints" / "7"
    info = json.loads((path / "info" / "metadata").read_text())
    del info["crc32"]
    info["config"][key] = value
    (path / "info" / "metadata").write_text(json.dumps(checkpoint_info.seal(info)))
    with pytest.raises(
        checkpoint.CheckpointError, match=rf"metadata is not of a.*\n.*config.{key}"
    ):
        checkpoint_info.read_info(path)
