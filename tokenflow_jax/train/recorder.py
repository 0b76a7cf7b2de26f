"""Run logging and reporting, and the checks that go with it."""

import functools
import json
import resource
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from clu import parameter_overview
from etils import epath

from tokenflow_jax.log import compiling, duration, log
from tokenflow_jax.messages import one_line
from tokenflow_jax.parallel import chips, hosts
from tokenflow_jax.train import (
    alarms,
    checkpoint,
    curves,
    explained,
    metrics,
    profile,
    report,
    timing,
    wandb_run,
    watch,
)
from tokenflow_jax.train.prefetch import DevicePrefetcher
from tokenflow_jax.train.run_config import LoopOptions
from tokenflow_jax.train.stage import Stage, State
from tokenflow_jax.train.stopping import StopRequested
from tokenflow_jax.train.workdir import Lock


class Start(NamedTuple):
    """Where a run starts."""

    state: State
    origin: str  # for the log and the report
    averages: Mapping[str, Any] = {}  # that were open when the checkpoint was saved


class Recorder:
    """Progress lines, curves, grids, evaluations, saves and the report of a run."""

    def __init__(
        self,
        stage: Stage,
        options: LoopOptions,
        lock: Lock,
        checkpoints: checkpoint.Checkpoints,
        config: Mapping[str, Any],
        start: Start,
        profile_steps: tuple[int, int] | None = None,
        began: float | None = None,
    ):
        """Open the writers and log how the run starts."""
        self._stage, self._options, self._lock = stage, options, lock
        self._checkpoints, self._config, self._origin = checkpoints, config, start.origin
        step = int(start.state.step)
        first = jax.process_index() == 0
        also = wandb_run.opened(config, lock.workdir, step) if first else ()
        self._writer = curves.Writer(lock.workdir, step, first, also)
        self._command = shlex.join(sys.orig_argv)
        texts = {
            "command": f"    {self._command}",
            "config": f"```\n{json.dumps(config, indent=2, sort_keys=True)}\n```",
            "notes": "\n".join(f"- {note}" for note in [start.origin, *stage.notes]),
        }
        self._writer.texts(step, texts)
        self._averages = metrics.Averages(**start.averages)
        self._failures: list[str] = []
        self._alarms, self._alarmed = alarms.Alarms(options.total_steps), []
        for line in self._writer.history:  # a run that goes on
            self._alarmed += self._alarms.of(line["step"], line)
        self._stopwatch = timing.Stopwatch(
            options.total_steps, stage.config.batch_size, _peak_rate()
        )
        if began is not None:
            self._stopwatch.count("starting", time.perf_counter() - began)
        self._watch = watch.Watch(lambda: self._stopwatch.usual_step)
        self._profiler = profile.Profiler(profile_steps, lock.workdir)
        self._pending: tuple[int, dict[str, jax.Array], tuple[int, float]] | None = None
        self._work = 0, 0.0  # tokens and operations of the running step
        self._step, self._first_step = step, step + 1
        self._compile_seconds: float | None = None
        evals = [line for line in self._writer.history if any(k[:5] == "eval/" for k in line)]
        # Of the process that has the files: whether to evaluate must be the same in all.
        self._evaluated_at = hosts.of_first_process(evals[-1]["step"] if evals else -1)
        self._drawn_at = hosts.of_first_process(max(self._writer.drawn, default=-1))
        log.info("stage %s in %s: %s", stage.name, lock.workdir, start.origin)
        for note in stage.notes:
            log.info("%s", note)

    def before_step(self, step: int, state: State, batch: Any) -> None:
        """Compile the step if it is the first, for batches of all shapes."""
        if self._compile_seconds is None:
            log.info("%s", compiling("compiling the training step", 40))
            began = time.perf_counter()
            with self._stopwatch.beside("compiling"):
                count = self._stage.compile(state, batch)
            self._compile_seconds = time.perf_counter() - began
            many = f" for {count} lengths of rows" if count > 1 else ""
            log.info("compiled%s: %s", many, duration(self._compile_seconds))
        self._work = self._stage.tokens_of(batch), self._stage.operations_of(batch)
        self._profiler.before(step)

    def after_dispatch(self, step: int, scalars: dict[str, jax.Array], data_wait: float) -> None:
        """Keep the scalars of a step just dispatched, and fetch those of the step before."""
        self._step = step
        self._stopwatch.waited(data_wait)
        self.drain()
        self._pending = step, scalars, self._work
        self._watch.doing(f"step {step}")
        self._profiler.after(step, scalars)

    def drain(self) -> None:
        """Fetch pending scalars, that is, wait for the last step."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._fetch(*pending)

    def evaluate_if_due(self, step: int, state: State) -> None:
        """Write held-out figures and image grids when they are due."""
        evaluate = self._options.due(self._options.eval_every, step) and step != self._evaluated_at
        images = self._options.due(self._options.image_every, step) and step != self._drawn_at
        if not (evaluate or images):
            return
        self.drain()
        if evaluate and (found := self._try(step, "evaluation", self._stage.evaluate, state)):
            figures = {
                name if name.startswith("eval/") else f"eval/{name}": float(value)
                for name, value in found.items()
            }
            texts = [f"{name.removeprefix('eval/')} {v:.4g}" for name, v in figures.items()]
            log.info("step %d  held-out: %s", step, "  ".join(texts))
            self._writer.scalars(step, figures)
            self._evaluated_at = step
        if images:
            self._lock.check()
            self._try(step, "drawing of pictures", functools.partial(self._draw, step), state)

    def _draw(self, step: int, state: State) -> dict[str, Any]:
        self._writer.images(step, self._stage.visualize(state))
        self._drawn_at = step
        return {}

    def _try(
        self, step: int, what: str, make: Callable[[State], Mapping], state: State
    ) -> Mapping[str, Any]:
        """Return figures or grids, or nothing and a line in log and report where that fails."""
        self._watch.doing("")
        try:
            with self._stopwatch.beside(what):
                return make(state)
        except StopRequested:
            log.warning("step %d: the %s is left out", step, what)
        except Exception as error:
            if jax.process_count() > 1:
                raise  # the other processes may wait for this one
            self._failures.append(f"step {step}: the {what} failed: {one_line(error)}")
            trace = None if isinstance(error, OSError) else error
            log.error("%s; the run goes on", self._failures[-1], exc_info=trace)
        return {}

    @property
    def complete(self) -> bool:
        """All steps are done, and the last evaluation and its pictures."""
        total, failed = self._options.total_steps, bool(self._failures)
        return self._step == total and (failed or self._evaluated_at == self._drawn_at == total)

    def save(self, step: int, state: State, data: DevicePrefetcher) -> None:
        """Save a checkpoint after checking that the step and the state are finite."""
        self.drain()
        self._watch.doing("")
        with self._stopwatch.beside("saving"):
            self._lock.check()
            bad = non_finite_arrays(state)
            if bad:
                raise metrics.NonFiniteError(
                    f"step {step}: not finite in the state: {', '.join(bad)}"
                )
            self._writer.flush()  # the curves must reach at least as far as the checkpoint
            self._checkpoints.save(step, state, data, self._config, self._averages.sums())

    def finish(self, step: int, stopped_by: str | None) -> None:
        """Write the report and log how the run ended."""
        self._write_report(step)
        log.info("share of training in the time: %s", self._stopwatch.goodput())
        total, page = self._options.total_steps, self._lock.workdir / "report.html"
        where = f"checkpoint {self._checkpoints.path(step)}, report {page}"
        if stopped_by and not self.complete:
            log.info("stopped by %s at step %d of %d: %s", stopped_by, step, total, where)
            log.info("run the same command again to continue")
        else:
            log.info("done at step %d: %s", step, where)

    def explain_non_finite(self, error: metrics.NonFiniteError) -> metrics.NonFiniteError:
        """Write the report, and add the last good checkpoint and a remedy to the error."""
        self._checkpoints.wait()
        self._write_report(self._step)
        last, good = self._checkpoints.latest_step(), "there is no checkpoint yet"
        if last is not None:
            good = f"the last good checkpoint is {self._checkpoints.path(last)}"
        return metrics.NonFiniteError(
            f"{error}. Training stopped, nothing of it was saved; {good}. Lower the learning rate "
            f"or tighten the clipping and run again; the same config would end the same way."
        )

    def close(self) -> None:
        self._watch.close()
        self._profiler.close()
        self._writer.close()

    def _fetch(self, step: int, scalars: dict[str, jax.Array], work: tuple[int, float]) -> None:
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        bad = metrics.non_finite(values)
        if bad:
            losses = [f"{name} = {v:.6g}" for name, v in values.items() if name[:5] == "loss/"]
            raise metrics.NonFiniteError(
                f"step {step}: {', '.join(bad)} not finite; {', '.join(losses)}"
            )
        self._averages.add(values)
        if step > self._first_step:  # which also loads the program
            tokens, operations = work
            self._stopwatch.step(tokens * values.get("filled", 1.0), operations)
        self._stopwatch.start()
        if self._options.due(self._options.log_every, step):
            line = self._averages.pop() | self._stopwatch.pop(step)
            total, headline = self._options.total_steps, self._stage.headline
            log.info("%s", metrics.progress_line(step, total, line, headline))
            self._writer.scalars(step, line)
            for text in self._alarms.of(step, line):
                log.warning("%s", text)
                self._alarmed.append(text)

    def _write_report(self, step: int) -> None:
        if jax.process_index() != 0:
            return
        self._lock.check()
        facts = {"stage": self._stage.name, "step": f"{step} of {self._options.total_steps}"}
        for name, value in self._stopwatch.summary().items():
            facts[name.removeprefix("perf/").replace("_", " ")] = explained.quantity(name, value)
        if self._compile_seconds is not None:
            facts["compilation"] = duration(self._compile_seconds)
        facts["share of training in the time"] = self._stopwatch.goodput()
        facts["memory at most"] = _memory_peak()
        facts["devices"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        facts["start"], facts["command"] = self._origin, self._command
        notes = [*self._stage.notes, *self._stage.final_notes(), *self._failures, *self._alarmed]
        self._writer.flush()
        report.write_report(self._lock.workdir, self._writer.history, facts, self._config, notes)


def _peak_rate() -> float:
    """Return operations per second of all devices at their peak; 0 where it is not known."""
    chip = chips.chip_of(jax.devices()[0].device_kind)
    return jax.device_count() / chip.devices * chip.tflops * 1e12 if chip else 0.0


def _memory_peak() -> str:
    """Say how much memory the fullest local device, or this process, has held at most."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return f"{max(peaks) / 2**30:.2f} GiB on a device"
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{process / 2**20:.2f} GiB of this process"


def non_finite_arrays(tree: Any) -> list[str]:
    """Return the names of the floating arrays that hold a NaN or an infinity."""
    floats = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    good = jax.device_get(_all_finite(floats))
    return [name for name in floats if not good[name]]


@jax.jit
def _all_finite(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(array).all() for name, array in arrays.items()}


def log_parameters(params: Mapping[str, Any], workdir: epath.Path) -> None:
    """Log the size of each top-level part; write the table of all arrays to parameters.txt."""
    counts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in params.items()
    }
    text = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    log.info("parameters: %s; total %s", text, f"{sum(counts.values()):,}")
    if jax.process_index() == 0:
        table = parameter_overview.get_parameter_overview(dict(params), include_stats="sharding")
        (workdir / "parameters.txt").write_text(table + "\n")
