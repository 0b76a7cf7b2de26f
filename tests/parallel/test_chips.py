"""Topologies: names, rings, links."""

import pytest

from tokenflow_jax.parallel import chips


def test_topologies():
    topology = chips.parse_topology("2*v5e:16x16")
    assert (topology.chips, topology.devices, str(topology)) == (512, 512, "2*v5e:16x16")
    assert chips.parse_topology("tpu7x:2x2x1").devices == 8
    assert chips.parse_topology("h100:64").chip.memory_bytes == 80e9
    for wrong in ("v5p", "v9:2x2", "v5e:4x0", "4x4", "v5e:4x4:2"):
        with pytest.raises(ValueError, match=r"has no chips|write CHIP:SHAPE"):
            chips.parse_topology(wrong)


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("v5p:4x4x4", (True, True, True)),
        ("v5p:4x4x8", (True, True, True)),
        ("v4:2x4x4", (False, False, False)),
        ("v5p:2x2x1", (False, False, False)),
        ("v5e:16x16", (True, True, False)),
        ("v6e:8x16", (False, True, False)),
        ("v5e:4x4", (False, False, False)),
    ],
)
def test_whole_cubes_and_sixteen_chips_make_rings(name, wrap):
    assert chips.parse_topology(name).wrap == wrap


def test_links_in_use():
    for name, rate in (
        ("v5p:4x4x4", 540),
        ("v5p:2x2x1", 180),  # two of three dimensions, without rings
        ("v6e:16x16", 360),
        ("v6e:8x16", 270),
        ("v5e:1x1", 0),
        ("v4:4x4x4", 135),  # of a chip's two devices one
        ("h100:8", 450),
        ("h100:16", 400),  # the machine's adapters
        ("a100:16", 300),
    ):
        assert chips.parse_topology(name).links_gbs == rate, name


def test_the_clock_is_the_peak_over_the_operations_of_a_cycle():
    """Matrix units of one chip, and their sides."""
    for name, units, side in (
        ("v4", 8, 128),
        ("v5e", 4, 128),
        ("v5p", 8, 128),
        ("v6e", 4, 256),
        ("tpu7x", 8, 256),
    ):
        chip = chips.CHIPS[name]
        assert chip.tflops * 1e3 == pytest.approx(
            units * side * side * 2 * chip.clock_ghz, rel=0.01
        ), name


@pytest.mark.parametrize(
    "kind,name",
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_devices_are_known_by_what_jax_calls_them(kind, name):
    chip = chips.chip_of(kind)
    assert (chip and chip.name) == name
