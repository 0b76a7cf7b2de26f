"""Names that FSDP, torch.compile and training classes have lengthened by segments of their own."""

import collections
from collections.abc import Callable, Collection, Mapping
from typing import Any

from tokenflow_jax.log import log
from tokenflow_jax.messages import shown

_SEGMENTS = frozenset(
    (
        "module", "model", "_orig_mod", "_forward_module", "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
    )
)  # fmt: skip


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _SEGMENTS)


def unwrapped(
    state: Mapping[str, Any], expected: Collection[str], allowed: Callable[[str], bool]
) -> Mapping[str, Any]:
    """Return a checkpoint under the model's names where these lack only wrappers' segments.

    Names that fit, that fit in no way, or that would collide stay as they are.

    Args:
      expected: the names of the model's tensors.
      allowed: True for names beyond them that may be there.
    """
    strange = [name for name in state if name not in expected and not allowed(name)]
    if not strange:
        return state
    short = collections.defaultdict(list)
    for name in expected:
        short[_bare(name)].append(name)
    found = {}
    for name in strange:
        bare = _bare(name)
        fitting = short.get(bare) or ([bare] if allowed(bare) else [])
        if len(fitting) == 1 and len(fitting[0]) < len(name) and fitting[0] not in state:
            found[name] = fitting[0]
    times = collections.Counter(found.values())
    found = {name: new for name, new in found.items() if times[new] == 1}
    if found:
        name, new = next(iter(found.items()))
        log.info(
            "%s: %d names without the segments of wrappers, such as %s for %s",
            getattr(state, "path", "") or "weights", len(found), shown(new), shown(name),
        )  # fmt: skip
    return {found.get(name, name): tensor for name, tensor in state.items()}
