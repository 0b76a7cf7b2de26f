"""The rows of the suites: configs of ours with settings of their own, sized by a budget."""

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.matrix import Run

SUITES = ("paper", "quantizers", "understanding", "sampling")
# Seeds of each row, by the time that a whole suite takes on two cores. One seed decides nothing.
BUDGETS = {"10m": 1, "2h": 3, "8h": 3}
# Steps of each run. An accelerator takes the larger ones, `ON_ACCELERATORS` times as many.
_STEPS = {
    "paper": {"10m": 200, "2h": 1000, "8h": 5000},
    "quantizers": {"10m": 60, "2h": 700, "8h": 3500},
    "understanding": {"10m": 100, "2h": 400, "8h": 1600},
    "sampling": {"10m": 200, "2h": 600, "8h": 3000},
}
ON_ACCELERATORS = 10
# Recipes of drawing, by their row; (top_k, top_p) of each pass, as in table 6 for 2,048 codes.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "one_pass": {"passes": ((50, 0.7),)},
    "two_passes": {"passes": ((50, 0.7), (1, 0.0))},
    "three_passes": {"passes": ((50, 0.7), (10, 0.7), (1, 0.0))},
    "unguided": {"passes": ((50, 0.7),), "guidance": 0.0},
    "guidance_3": {"passes": ((50, 0.7),), "guidance": 3.0},
    "guidance_6": {"passes": ((50, 0.7),), "guidance": 6.0},
}
_SHARED = {"model.scales": (8,)}
_SCALES = (1, 2, 3, 4, 6, 8)


def rows(
    suite: str,
    budget: str,
    *,
    data: Mapping[str, Any],
    tokenizer: str,
    accelerator: bool = False,
) -> list[Run]:
    """Return the runs of a suite.

    Args:
      suite, budget: one of SUITES and of BUDGETS.
      data: settings of the data that tokenizers train on; of the emoji, none.
      tokenizer: that the language models read, a workdir.
      accelerator: take the larger sizes.
    """
    steps = _STEPS[suite][budget] * (ON_ACCELERATORS if accelerator else 1)
    common = {"total_steps": steps, "checkpoint_every": steps, "image_every": 0}
    if suite == "understanding":
        common |= {"tokenizer.path": tokenizer, "eval_every": max(1, steps // 4)}
        # Room for the vectors of all scales, 130 instead of 64.
        common |= {"data.max_length": 240, "data.buckets": (128, 160, 208)}
        names = ("last_scale", "full_scale", "residual", "last_scale_semantic", "last_scale_pixel")
        return [
            Run(name, "configs/understanding.py", {**common, "model.strategy": name})
            for name in names
        ]
    if suite == "sampling":  # one model per seed; its rows are RECIPES
        common |= {"tokenizer.path": tokenizer, "eval_every": 0, "eval.retrieval": 0}
        return [Run("drawer", "configs/generation.py", common)]
    # All parameters train, so that rows differ in nothing but what they are named after.
    common |= {"trainable": (), "eval_every": max(1, steps // 8), **data}
    common |= {"teacher.init_encoder": suite == "quantizers"}
    common |= {"losses.perceptual_weight": 0.0}  # whether LPIPS's weights are installed or not
    run = Run("", "configs/tokenizer.py", common)
    if suite == "paper":
        return [
            run.with_settings({**_SHARED, "model.quantizer.mapping": "joined"}, "joined"),
            # Two indices of half the bits: 46 ** 2 is a little more than 2,048.
            run.with_settings(
                {**_SHARED, "model.quantizer.mapping": "separate", "model.codebook_size": 46},
                "separate",
            ),
            run.with_settings(_SHARED, "shared"),
            run.with_settings({"model.scales": (1, 2, 8)}, "three_scales"),
            run.with_settings({"model.scales": _SCALES}, "multi_scale"),
            run.with_settings(
                {"model.scales": _SCALES, "teacher.init_encoder": True}, "semantic_start"
            ),
        ]
    unrevived = {"codebook.revive_every": 0}  # for those whose codes cannot be brought back
    kinds = {
        "vq": {},
        "rotation": {},
        "ibq": {},
        "vq_unrevived": {"model.quantizer.kind": "vq", **unrevived},
        "simvq": unrevived,
        # Grids of 2,048 points for the pixel half; their number of channels follows.
        "fsq": {"model.quantizer.levels": (8, 8, 8, 4), "model.pixel_channels": 4, **unrevived},
        "bsq": {"model.pixel_channels": 11, **unrevived},
        "lfq": {"model.pixel_channels": 11, **unrevived},
        # Two indices of half the bits.
        "two_heads": {
            "model.quantizer.kind": "vq", "model.quantizer.heads": 2, "model.codebook_size": 46,
        },
    }  # fmt: skip
    return [
        run.with_settings({"model.quantizer.kind": name, **settings}, name)
        for name, settings in kinds.items()
    ]


def bits(settings: Mapping[str, Any]) -> float:
    """Return the bits of a picture that a tokenizer's settings make, of the quickstart's model."""
    tokens = sum(side * side for side in settings.get("model.scales", _SCALES))
    size = settings.get("model.codebook_size", 2048)
    separate = settings.get("model.quantizer.mapping") == "separate"
    indices = 2 if separate else settings.get("model.quantizer.heads", 1)
    return tokens * indices * math.log2(size)
