"""A kernel is used if it agrees with its plain form, and left out with a warning if it does not."""

import pytest

from tokenflow_jax.parallel import self_check


def no_memory():
    raise RuntimeError("out of\nVMEM")


@pytest.mark.parametrize(
    ("difference", "warning"),
    [
        (lambda: 0.01, ""),
        (lambda: 0.5, "the kernel is not used here: its results are off by 0.5"),
        (lambda: float("nan"), "off by nan"),
        (no_memory, "the kernel is not used here: out of VMEM"),
    ],
)
def test_only_kernels_that_agree_pass(caplog, difference, warning):
    assert self_check.passes("the kernel", difference, 0.1) == (not warning)
    assert warning in caplog.text and bool(caplog.text) == bool(warning)
