"""Compare one model that answers and draws with two specialists of its size, over several seeds.

    python -m benchmarks.joint --tokenizer=runs/quickstart --out=runs/joint
    python -m benchmarks.joint --switches --seeds=1     options of the drawer, one by one

All are the unified quickstart's model, and see as many examples of each kind of data: the reader
as many questions, the drawer as many requests as the joint model, in other batches. The cycle of
the specialists: the drawer draws, the reader answers. About an hour and a half on two cores; what
was finished is not trained again.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks import matrix
from benchmarks.matrix import Run

_CONFIG = "configs/unified.py"
# The joint model's 640 steps spend 4 of 7 examples on pictures, and ask 4 questions in as many.
_STEPS = round(640 * 4 / 7)
RUNS = (
    Run("joint", _CONFIG),
    Run(
        "reader",
        _CONFIG,
        {
            "total_steps": _STEPS,
            "data.questions": ("kind", "kind", "kind", "name"),
            "data.buckets": (192, 224, 256),
            "eval.retrieval": 0,
            "eval.prompts": (),
        },
    ),
    Run("drawer", _CONFIG, {"total_steps": _STEPS, "data.questions": ("draw",)}),
)
_DRAWER = RUNS[-1]
SWITCHES = (
    _DRAWER,
    _DRAWER.with_settings({"model.rope": "3d"}, "rope_3d"),
    _DRAWER.with_settings({"model.scale_inputs": "residual"}, "residual_inputs"),
    _DRAWER.with_settings({"losses.scale_power": 1.8}, "power_1.8"),  # NextFlow's exponent, 0.9
    _DRAWER.with_settings({"losses.scale_power": 0.0}, "power_0"),
)
FIGURES = {
    "kinds named": "exact_match",
    "with pictures exchanged": "exact_match_other_images",
    "held-out retrieval in ten": "top10_unseen",
    "trained retrieval in ten": "top10_trained",
    "held-out codes": "accuracy_codes",
    "loss of held-out codes": "loss_draw",
    "cycle": "cycle",
}
_DRAWN = {
    "loss of held-out codes": "loss_draw",
    "held-out codes": "accuracy_codes",
    "held-out retrieval in ten": "top10_unseen",
    "trained retrieval in ten": "top10_trained",
}
_READ = ("exact_match", "exact_match_other_images")


def main() -> None:
    """Train what is missing, and print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", default="runs/quickstart")
    parser.add_argument("--out", default="runs/joint")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--switches", action="store_true", help="compare options of the drawer")
    options = parser.parse_args()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    compare = _switches if options.switches else _joint
    compare(options.tokenizer, out, options.seeds)


def _trained(runs: Sequence[Run], tokenizer: str, seed: int, out: Path) -> dict[str, Path]:
    folders = {}
    for run in runs:
        print(f"training {run.name}, seed {seed}", flush=True)
        folders[run.name] = run.with_settings({"tokenizer.path": tokenizer}).train(seed, out)
    return folders


def _joint(tokenizer: str, out: Path, seeds: int) -> None:
    found, cycle = defaultdict(list), None
    for seed in range(seeds):
        runs = _trained(RUNS, tokenizer, seed, out)
        read, joint, drawn = (matrix.figures(runs[n]) for n in ("reader", "joint", "drawer"))
        cycle = cycle or Cycle(tokenizer)
        specialists = {key: (read if key in _READ else drawn).get(key) for key in FIGURES.values()}
        specialists["cycle"] = cycle(runs["reader"], runs["drawer"])
        found["joint"].append(joint)
        found["specialists"].append(specialists)
        _write(found, FIGURES, out / "joint.md")


def _switches(tokenizer: str, out: Path, seeds: int) -> None:
    found = defaultdict(list)
    for seed in range(seeds):
        for name, folder in _trained(SWITCHES, tokenizer, seed, out).items():
            found[name].append(matrix.figures(folder))
        _write(found, _DRAWN, out / "switches.md")


def _write(found: dict[str, list[dict[str, float]]], figures: dict[str, str], path: Path) -> None:
    """Print and write the table so far, a line per figure."""
    rows = []
    for label, key in figures.items():
        form = {"times": 1.0, "form": "{:.3f}"} if key.startswith("loss") else {}
        values = ([one.get(key) for one in found[name]] for name in found)
        rows.append([label, *(matrix.spread(own, **form) for own in values)])
    text = matrix.table([f"%, {len(next(iter(found.values())))} seeds", *found], rows)
    print(text, flush=True)
    path.write_text(text + "\n", encoding="utf-8")


class Cycle:
    """Draws with one run and asks another about it."""

    def __init__(self, tokenizer: str):
        from configs import unified
        from tokenflow_jax import stages
        from tokenflow_jax.parallel import mesh

        config = unified.get_config()
        config.tokenizer.path = tokenizer
        self._stage = stages.make_stage(config, mesh.make_mesh(config.mesh)).open()

    def __call__(self, reader: Path, drawer: Path) -> float:
        """Return the share of pictures by `drawer` that `reader` names the kind of."""
        import tokenflow_jax as tfx

        read, drawn = (tfx.Unified.load(path).params for path in (reader, drawer))
        return self._stage.cycle(read, self._stage.generator.with_params(drawn))["cycle"]


if __name__ == "__main__":
    main()
