"""Compare one model that answers and draws with two specialists of its size, over several seeds.

    python -m benchmarks.joint --tokenizer=runs/quickstart --out=runs/joint

All are the unified quickstart's model, and see as many examples of each kind of data: the reader
as many questions, the drawer as many requests as the joint model, in other batches. The cycle of
the specialists: the drawer draws, the reader answers. About an hour and a half on two cores; what
was finished is not trained again.
"""

import argparse
from collections import defaultdict
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
FIGURES = {
    "kinds named": "exact_match",
    "with pictures exchanged": "exact_match_other_images",
    "held-out retrieval in ten": "top10_unseen",
    "trained retrieval in ten": "top10_trained",
    "codes": "accuracy_codes",
    "cycle": "cycle",
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
    options = parser.parse_args()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    found, cycle = defaultdict(list), None
    for seed in range(options.seeds):
        runs = {}
        for run in RUNS:
            print(f"training {run.name}, seed {seed}", flush=True)
            own = Run(run.name, run.config, {**run.settings, "tokenizer.path": options.tokenizer})
            runs[run.name] = own.train(seed, out)
        read, joint, drawn = (matrix.figures(runs[n]) for n in ("reader", "joint", "drawer"))
        cycle = cycle or Cycle(options.tokenizer)
        specialists = {key: (read if key in _READ else drawn)[key] for key in FIGURES.values()
                       if key != "cycle"}  # fmt: skip
        specialists["cycle"] = cycle(runs["reader"], runs["drawer"])
        found["joint"].append(joint)
        found["specialists"].append(specialists)
        text = _table(found)
        print(text, flush=True)
        (out / "joint.md").write_text(text + "\n", encoding="utf-8")


def _table(found: dict[str, list[dict[str, float]]]) -> str:
    rows = [
        [label, *(matrix.spread([figures[key] for figures in found[name]]) for name in found)]
        for label, key in FIGURES.items()
    ]
    seeds = len(found["joint"])
    return matrix.table([f"%, of {seeds} seeds", *found], rows)


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
