"""Reads the weights of a checkpoint of ours at once."""

from tokenflow_jax.weights.formats import orbax
from tokenflow_jax.weights.rules import unflatten


def load_for_inference(path, step=None, subtrees=("params", "ema")):
    """Return (config, state): the state is nested NumPy arrays by field, and the `step`."""
    info, arrays = orbax.open_checkpoint(path, step, subtrees)
    state = unflatten({name: tensor.read() for name, tensor in arrays.items()})
    return info["config"], {**state, "step": info["step"]}
