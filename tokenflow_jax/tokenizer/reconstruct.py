"""Images to codes and back in one compiled call, for evaluations."""

from collections.abc import Callable

from tokenflow_jax.nets.pixels import to_float, to_uint8
from tokenflow_jax.parallel import hosts
from tokenflow_jax.tokenizer.model import TokenFlow


def reconstructor(model: TokenFlow) -> Callable:
    """Return (params, uint8 images) -> (codes (B, L), uint8 reconstructions, quantized map)."""

    def reconstruct(params, images_BHWC):
        pyramid, decoded = model.apply({"params": params}, to_float(images_BHWC))
        return pyramid.codes_BL, to_uint8(decoded.images_BHWC), pyramid.quantized_BHWC

    return hosts.over_local_devices(reconstruct)
