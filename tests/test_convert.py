"""`python -m tokenflow_jax.convert`: flags, one-line errors, hostile files, and memory."""

import os
import pickle
import resource
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny
from golden import weights
from golden.loading import manifest
from torch_states import random_state, tiny_part

from tokenflow_jax.convert import run
from tokenflow_jax.tokenizer import names
from tokenflow_jax.weights.formats.safetensors import write_safetensors
from tokenflow_jax.weights.formats.torch import open_state_dict
from tokenflow_jax.weights.formats.torch_zip import write_torch_zip

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def part(monkeypatch):
    monkeypatch.setattr(names, "PART", tiny_part())


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Work in a folder with there.pt, a good checkpoint of the variant clip."""
    monkeypatch.chdir(tmp_path)
    write_torch_zip("there.pt", {"model": random_state(tiny.TINY)})
    return tmp_path


def refused(capsys, *flags):
    """Run the command, which must fail without a traceback; return its message."""
    assert run(flags) == 2
    out, text = capsys.readouterr()
    assert not out and text.startswith("convert: ") and text.endswith("\n")
    return text[:-1]


def test_there_and_back(here, capsys):
    assert run(["--src=there.pt", "--dst=ours", "--to=orbax", "--variant=clip"]) == 0
    assert run(["--src=ours", "--dst=back.safetensors", "--to=torch"]) == 0
    assert capsys.readouterr().out.count("raw weights") == 2
    there, back = open_state_dict("there.pt"), open_state_dict("back.safetensors")
    assert set(there) == set(back)
    assert all(there[name].read().tobytes() == back[name].read().tobytes() for name in there)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dst=x.pt", "--to=orbax", "--variant=clip"], "--to=orbax does not go with --dst=x.pt"),
        (["--dst=x", "--to=torch", "--variant=clip"], "--to=torch does not go with --dst=x:"),
        (["--dst=x", "--to=orbax", "--variant=small"], "--variant=small: one of clip, vitamin"),
        (["--dst=x", "--to=orbax"], "say which model it holds, --variant=one of clip"),
        (["--dst=x", "--to=orbax", "--part=lm"], "--part=lm: one of tokenizer, generation"),
        (
            ["--dst=x", "--to=orbax", "--variant=clip", "--weights=ema"],
            "no ema weights; it has raw",
        ),
        (["--dst=x", "--to=orbax", "--variant=clip", "--src=no.pt"], "no.pt: no such file"),
        (["--dst=x", "--to=orbax", "--src=none"], "none holds no checkpoint"),
        (["--dst=there.pt", "--to=torch", "--variant=clip"], "there.pt exists; give --overwrite"),
    ],
)
def test_mistakes_are_one_line(here, capsys, flags, message):
    text = refused(capsys, "--src=there.pt", *flags)
    assert message in text and "\n" not in text
    assert [path.name for path in here.iterdir()] == ["there.pt"]


def test_three_wrong_tensors_are_all_reported(here, capsys):
    state = random_state(tiny.TINY)
    state["quant_conv.weight"] = state["quant_conv.weight"][:-1]
    state["encoder.conv_inn.bias"] = state.pop("encoder.conv_in.bias")
    write_safetensors("wrong.safetensors", state)
    text = refused(capsys, "--src=wrong.safetensors", "--dst=ours", "--to=orbax", "--variant=clip")
    assert "3 problems" in text and "these weights fit" not in text
    for name in (
        "quant_conv.weight: (2, 8, 1, 1)",
        "encoder.conv_in.bias",
        "encoder.conv_inn.bias",
    ):
        assert name in text


def test_the_variant_that_fits_is_named(here, capsys):
    text = refused(capsys, "--src=there.pt", "--dst=ours", "--to=orbax", "--variant=wide")
    assert text.endswith("these weights fit the variant clip and the variant clip_again")


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_malicious_pickle_is_refused_and_nothing_runs(here, capsys):
    evil = {"model": {"x": np.zeros(2)}, "args": Call(os.system, "touch ran")}
    with zipfile.ZipFile("evil.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(evil, 2))
    text = refused(capsys, "--src=evil.pt", "--dst=ours", "--to=orbax", "--variant=clip")
    assert "system" in text and "nothing was run" in text and "\n" not in text
    assert sorted(path.name for path in here.iterdir()) == ["evil.pt", "there.pt"]


@pytest.mark.parametrize("damage", [lambda raw: raw[:2000], lambda raw: b"", lambda raw: raw[::-1]])
def test_damaged_files_are_one_line(here, capsys, damage):
    Path("damaged.pt").write_bytes(damage(Path("there.pt").read_bytes()))
    text = refused(capsys, "--src=damaged.pt", "--dst=ours", "--to=orbax", "--variant=clip")
    assert "damaged.pt" in text and "\n" not in text
    assert not Path("ours").exists()


@pytest.mark.filterwarnings("ignore:.*:pytest.PytestUnraisableExceptionWarning")  # TensorStore's
@pytest.mark.parametrize(("target", "kind"), [("x.pt", "torch"), ("x", "orbax")])
def test_a_full_disk_leaves_what_was_there(here, capsys, target, kind):
    """A limit on file size stands in for the full disk: the kernel refuses the write alike."""
    flags = ["--src=there.pt", f"--dst={target}", f"--to={kind}", "--variant=clip", "--overwrite"]
    assert run(flags) == 0
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    capsys.readouterr()
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, previous[1]))
        text = refused(capsys, *flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)
        signal.signal(signal.SIGXFSZ, handler)
    assert "free some space" in text
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


MEASURE = """
    import dataclasses, resource, sys
    sys.path.insert(0, "tests")
    import numpy as np, tiny
    from tokenflow_jax.convert import prepare_process, run
    from tokenflow_jax.nets.vit import ViTConfig
    from tokenflow_jax.tokenizer.names import PART
    from tokenflow_jax.weights.formats.torch_zip import write_torch_zip
    from tokenflow_jax.weights.rules import flatten

    config = dataclasses.replace(
        tiny.TINY, vit=ViTConfig(image_size=16, patch_size=4, width=768, depth=12, heads=8)
    )
    PART.variants.clear()
    PART.variants["deep"] = config
    flat = flatten(PART.template(config))
    sizes = [4 * int(np.prod(leaf.shape)) for leaf in flat.values()]
    folder = sys.argv[1]
    if sys.argv[2] == "make":
        state = {}
        for path, leaf in flat.items():
            rule, names = PART.table(config).find(path, leaf.shape)
            shape = rule.torch_shape(leaf.shape)
            draw = np.random.default_rng(0).standard_normal
            state |= {name: draw(shape, np.float32) for name in names}
        write_torch_zip(f"{folder}/there.pt", {"model": state})
    else:
        def peak():
            return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        prepare_process()
        before = peak()
        for target in sys.argv[4:]:
            flags = [f"--src={folder}/{sys.argv[2]}", f"--to={sys.argv[3]}", "--variant=deep"]
            assert run([*flags, f"--dst={folder}/{target}"]) == 0
        print(peak() - before, max(sizes), sum(sizes))
"""


def run_measured(folder, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(folder), *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()


@pytest.mark.slow
def test_memory_holds_one_array_at_a_time(tmp_path):
    """The peak is 1.3 times the largest array, plus the libraries' own memory and the target."""
    libraries = 32 * 2**20
    run_measured(tmp_path, "make")
    *_, figures = run_measured(tmp_path, "there.pt", "orbax", "ours")
    peak, largest, total = map(int, figures.split())
    assert largest > 100e6 and total > 300e6
    assert peak < 1.3 * largest + total
    *_, figures = run_measured(tmp_path, "ours", "torch", "back.pt", "back.safetensors")
    peak = int(figures.split()[0])
    assert peak < 1.3 * largest + libraries  # the target is a file


@pytest.mark.slow
def test_the_largest_released_size_comes_back_bit_for_bit(tmp_path, monkeypatch):
    """Of the others, test_tables.py has names and, narrower, bits; test_api.py loads them."""
    monkeypatch.undo()  # the released variants
    state = weights.state_dict(manifest("tokenizer_siglip_384"), 0)
    write_safetensors(tmp_path / "there.safetensors", state)
    flags = [f"--src={tmp_path}/there.safetensors", "--to=orbax", "--variant=xl"]
    assert run([*flags, f"--dst={tmp_path}/ours"]) == 0
    assert run([f"--src={tmp_path}/ours", "--to=torch", f"--dst={tmp_path}/back.pt"]) == 0
    back = open_state_dict(tmp_path / "back.pt")
    assert set(back) == set(state)
    assert all(back[name].read().tobytes() == array.tobytes() for name, array in state.items())
