"""The one training loop: every stage gives it a `Stage` and reads nothing else of it.

Read `train_and_evaluate` from top to bottom; the rest of the file are its parts.
"""

import dataclasses
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from etils import epath

from tokenflow_jax import checkpoint, metrics, report
from tokenflow_jax.runlog import log
from tokenflow_jax.train.prefetch import DevicePrefetcher

State = Any  # a flax.struct pytree with an int32 scalar `.step`
Batch = Any  # a pytree of global jax.Arrays


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage hands to the loop. `train/<stage>.py` builds it in `make_stage(config, mesh)`.

    Attributes:
      name: for logs and the report, for example "tokenizer".
      init: returns the initial state from scratch, sharded: a flax.struct pytree of arrays with an
        int32 scalar `.step` = 0. Every floating array in it must stay finite.
      step: (state, frozen, batch) -> (state, metrics). Jitted, donates the state. `metrics` holds
        scalars: "loss/total" and whatever else is worth a curve; every "loss/*" must be finite.
      train_data: returns the infinite data iterator of this process (Grain's, or anything with
        `__next__`, `get_state` and `set_state`); batches are pytrees of host-local NumPy arrays.
      batch_sharding: how a global batch lies on the devices.
      evaluate: state -> held-out figures; names get the prefix "eval/" when they lack it.
      visualize: state -> grids, name -> uint8 (height, width, 3).
      images_per_step: images per optimiser step over all processes, for images/s.
      warm_start: applies config.init_from to a fresh state; returns it and a text of what was
        loaded from where. None when config.init_from is empty.
      frozen: weights that `step` reads and never changes (a teacher, LPIPS); not checkpointed.
      notes: lines to log at the start and print in the report ("trained without LPIPS: ...").
      final_notes: called at the end, returns lines such as the pictures that were skipped.
      headline: metrics of the progress line, in order; all losses when empty.
    """

    name: str
    init: Callable[[], State]
    step: Callable[[State, Any, Batch], tuple[State, dict[str, jax.Array]]]
    train_data: Callable[[], Any]
    batch_sharding: jax.sharding.NamedSharding
    evaluate: Callable[[State], Mapping[str, float]]
    visualize: Callable[[State], Mapping[str, np.ndarray]]
    images_per_step: int
    warm_start: Callable[[State], tuple[State, str]] | None = None
    frozen: Any = None
    notes: list[str] = dataclasses.field(default_factory=list)
    final_notes: Callable[[], list[str]] | None = None
    headline: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """The part of the config that the loop reads; a field that the config lacks has this default.

    Attributes:
      total_steps: optimiser steps of the whole run, restored ones included.
      log_every: steps between progress lines and points of the curves.
      eval_every: steps between evaluations; 0 only at the end.
      image_every: steps between image grids; 0 only at the end.
      checkpoint_every: steps between checkpoints; 0 only at the end.
      keep_checkpoints: how many of the latest checkpoints stay on disk.
    """

    total_steps: int
    log_every: int = 20
    eval_every: int = 0
    image_every: int = 0
    checkpoint_every: int = 0
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        lowest = {"total_steps": 1, "log_every": 1, "keep_checkpoints": 1}
        problems = []
        for field in dataclasses.fields(self):
            value, low = getattr(self, field.name), lowest.get(field.name, 0)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                problems.append(f"{field.name}={value!r} must be an integer of at least {low}")
        if problems:
            raise ValueError("; ".join(problems))

    @classmethod
    def from_config(cls, config: Any) -> "LoopOptions":
        """Takes the fields from a ConfigDict; ValueError lists every bad one."""
        values = checkpoint.config_to_dict(config)
        if "total_steps" not in values:
            raise ValueError("the config has no total_steps; set the number of optimiser steps")
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: values[name] for name in names if name in values})

    def due(self, every: int, step: int) -> bool:
        """Whether something done each `every` steps, and at the end, is due after `step`."""
        return step == self.total_steps or (every > 0 and step % every == 0)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: the final state, and the name of the signal that stopped it, if one did."""

    state: State
    stopped_by: str | None = None


def train_and_evaluate(config: Any, workdir: str | epath.Path, stage: Stage) -> Result:
    """Trains a stage to config.total_steps, beginning or continuing in `workdir`.

    Where the state comes from, the first that applies:
      1. the latest complete checkpoint in the workdir: state, position in the data, step; the run
         goes on as if it had never stopped, bit for bit;
      2. config.init_from (another run's or pretrained weights): a fresh state in which
         stage.warm_start replaced what it found there; step 0, new data;
      3. scratch: stage.init().
    On SIGTERM or Ctrl-C the running step is finished and saved, and the function returns.

    Args:
      config: ConfigDict; the loop reads the fields of LoopOptions, the rest is the stage's.
      workdir: where checkpoints, curves, grids and the report go.
      stage: what to train.

    Returns:
      The final state and what stopped the run, if not its end.

    Raises:
      NonFiniteError: a loss or the state is NaN or infinite; nothing of it was saved.
      CheckpointError: a checkpoint could not be written, or does not fit.
      ValueError: bad options.
    """
    options = LoopOptions.from_config(config)
    workdir = epath.Path(workdir)
    saved_config = checkpoint.config_to_dict(config)
    with checkpoint.WorkdirLock(workdir), StopSignals() as stop:
        checkpoints = checkpoint.Checkpoints(workdir, options.keep_checkpoints)
        data = DevicePrefetcher(stage.train_data(), stage.batch_sharding)
        state, origin = restore_or_initialise(saved_config, stage, checkpoints, data)
        step = first_step = int(state.step)
        recorder = Recorder(stage, options, workdir, saved_config, origin, step)
        try:
            while step < options.total_steps and not stop.requested(checkpoints, step):
                batch = next(data)  # already on the device, unless the data is too slow
                state, scalars = stage.step(state, stage.frozen, batch)
                step += 1
                # Fetches the scalars of the step before, while the device works on this one.
                recorder.after_dispatch(step, scalars, data.last_wait)
                if step == first_step + 1:
                    recorder.finish_compilation()
                recorder.evaluate_if_due(step, state)
                if options.due(options.checkpoint_every, step):
                    recorder.save(checkpoints, step, state, data)
            if step == options.total_steps:  # a finished run may not have been evaluated yet
                recorder.evaluate_if_due(step, state)
            if step != checkpoints.latest_step():
                recorder.save(checkpoints, step, state, data)
            checkpoints.wait()
            recorder.finish(step, stop.name, checkpoints)
        except metrics.NonFiniteError as error:
            raise recorder.explain_non_finite(error, checkpoints) from error
        finally:
            recorder.close()
            data.close()
            checkpoints.close()
    return Result(state, stop.name)


# A change of these means another run: the saved position or the weights would be misread.
IDENTITY_KEYS = ("stage", "seed", "batch_size", "model", "data")
# These only say what is recorded when.
FREE_KEYS = (
    "log_every", "eval_every", "image_every", "checkpoint_every", "keep_checkpoints", "eval",
    "init_from", "workdir",
)  # fmt: skip


def restore_or_initialise(
    config: Mapping[str, Any],
    stage: Stage,
    checkpoints: checkpoint.Checkpoints,
    data: DevicePrefetcher,
) -> tuple[State, str]:
    """Applies the restore order of `train_and_evaluate`.

    Returns:
      The state and one line that says where it came from.
    """
    state = stage.init()
    log_parameters(getattr(state, "params", state))
    step = checkpoints.latest_step()
    if step is not None:
        check_config_change(checkpoints.read_info(step)["config"], config, checkpoints.path(step))
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        del state  # before its successor takes the memory
        state = checkpoints.restore(step, like, data)
        return state, f"continued from checkpoint {checkpoints.path(step)} (step {step})"
    if stage.warm_start is not None:
        state, text = stage.warm_start(state)
        return state, f"warm start: {text}"
    return state, "initialised from scratch"


def check_config_change(old: Mapping[str, Any], new: Mapping[str, Any], path: Any) -> None:
    """Compares the config of a checkpoint with that of the run that continues it.

    Intervals may change freely and total_steps may grow. Any other change is named in a warning,
    since the run then is no longer what an uninterrupted one would have been.

    Raises:
      CheckpointError: one of IDENTITY_KEYS changed; all changes are listed.
    """
    changes = checkpoint.config_differences(old, new)
    lines = {key: f"config.{key}: {a!r} -> {b!r}" for key, (a, b) in changes.items()}
    identity = [text for key, text in lines.items() if key.split(".")[0] in IDENTITY_KEYS]
    if identity:
        raise checkpoint.CheckpointError(
            f"{path} was made with another model, data or seed:\n  - "
            + "\n  - ".join(identity)
            + f"\nUndo the change, or begin another --workdir with --config.init_from={path}."
        )
    free = [text for key, text in lines.items() if key.split(".")[0] in FREE_KEYS]
    exact = [text for text in lines.values() if text not in free]
    if free:
        log.info("changed since the checkpoint: %s", "; ".join(free))
    if exact:
        log.warning(
            "changed since the checkpoint, so this run will differ from an uninterrupted one: %s",
            "; ".join(exact),
        )


class StopSignals:
    """Turns SIGTERM and SIGINT into a request to stop after the running step.

    A second signal of the same kind ends the process at once. In a run of several processes JAX's
    preemption service sees SIGTERM instead and makes all of them stop after the same step.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                try:
                    self._previous[number] = signal.signal(number, self._handle)
                except ValueError:  # not the main thread: whoever owns it handles signals
                    break
        return self

    def __exit__(self, *unused: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        del frame
        self.name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)
        log.warning("%s: finishing the running step, then saving", self.name)

    def requested(self, checkpoints: checkpoint.Checkpoints, step: int) -> bool:
        """Whether to stop after `step`; the same answer in all processes."""
        if jax.process_count() > 1 and checkpoints.reached_preemption(step):
            self.name = signal.SIGTERM.name
        return self.name is not None


class Recorder:
    """All that a run tells the world: progress lines, curves, grids, evaluations, saves, report."""

    def __init__(
        self,
        stage: Stage,
        options: LoopOptions,
        workdir: epath.Path,
        config: Mapping[str, Any],
        origin: str,
        step: int,
    ):
        """Opens the writers and logs how the run begins."""
        self._stage, self._options, self._workdir = stage, options, workdir
        self._config, self._origin = config, origin
        self._writer = metrics.Writer(workdir, step, enabled=jax.process_index() == 0)
        self._averages = metrics.Averages()
        self._stopwatch = metrics.Stopwatch(options.total_steps, stage.images_per_step)
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._began = time.perf_counter()
        self._compile_seconds: float | None = None
        evals = [line for line in self._writer.history if any(k[:5] == "eval/" for k in line)]
        self._evaluated_at = evals[-1]["step"] if evals else None
        log.info("stage %s in %s: %s", stage.name, workdir, origin)
        for note in stage.notes:
            log.info("%s", note)

    def after_dispatch(self, step: int, scalars: dict[str, jax.Array], data_wait: float) -> None:
        """Takes the scalars of a step just dispatched, and fetches those of the one before."""
        self._stopwatch.waited(data_wait)
        previous, self._pending = self._pending, (step, scalars)
        if previous is not None:
            self._fetch(*previous)

    def drain(self) -> None:
        """Fetches what is still pending, that is, waits for the last step."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._fetch(*pending)

    def finish_compilation(self) -> None:
        """Ends the first step, which compiles and does not count for steps/s."""
        self.drain()
        self._compile_seconds = time.perf_counter() - self._began
        log.info("first step, with compilation: %s", metrics.duration(self._compile_seconds))
        self._stopwatch.start()

    def evaluate_if_due(self, step: int, state: State) -> None:
        """Writes held-out figures and image grids when their turn has come."""
        evaluate = self._options.due(self._options.eval_every, step) and step != self._evaluated_at
        images = self._options.due(self._options.image_every, step) and step != self._evaluated_at
        if not evaluate and not images:
            return
        self.drain()
        self._stopwatch.pause()
        if evaluate:
            figures = {
                name if name.startswith("eval/") else f"eval/{name}": float(value)
                for name, value in self._stage.evaluate(state).items()
            }
            self._writer.scalars(step, figures)
            self._evaluated_at = step
            log.info("%s", metrics.evaluation_line(step, figures))
        if images:
            self._writer.images(step, self._stage.visualize(state))
        self._stopwatch.start()

    def save(
        self,
        checkpoints: checkpoint.Checkpoints,
        step: int,
        state: State,
        data: DevicePrefetcher,
    ) -> None:
        """Saves a checkpoint after making sure that the step and the state are finite."""
        self.drain()
        self._stopwatch.pause()
        bad = non_finite_arrays(state)
        if bad:
            raise metrics.NonFiniteError(f"step {step}: not finite in the state: {', '.join(bad)}")
        self._writer.flush()  # the curves must reach at least as far as the checkpoint
        checkpoints.save(step, state, data, self._config)
        self._stopwatch.start()

    def finish(self, step: int, stopped_by: str | None, checkpoints: checkpoint.Checkpoints):
        """Writes the report and says how the run ended."""
        total = self._options.total_steps
        path = self._write_report(step)
        where = f"checkpoint {checkpoints.path(step)}, report {path}"
        if stopped_by and step < total:
            log.info("stopped by %s at step %d of %d: %s", stopped_by, step, total, where)
            log.info("run the same command again to continue")
        else:
            log.info("done at step %d: %s", step, where)

    def explain_non_finite(
        self, error: metrics.NonFiniteError, checkpoints: checkpoint.Checkpoints
    ) -> metrics.NonFiniteError:
        """Adds to the error which checkpoint is good and what to do."""
        checkpoints.wait()
        last = checkpoints.latest_step()
        good = f"the last good checkpoint is {checkpoints.path(last)}" if last is not None else (
            "there is no checkpoint yet"
        )
        return metrics.NonFiniteError(
            f"{error}. Training stopped, nothing of it was saved; {good}. Lower the learning rate "
            f"or tighten the clipping and run again; the same config would end the same way."
        )

    def close(self) -> None:
        """Closes the writers."""
        self._writer.close()

    def _fetch(self, step: int, scalars: dict[str, jax.Array]) -> None:
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        bad = metrics.non_finite(values)
        if bad:
            losses = {name: v for name, v in values.items() if name.startswith("loss/")}
            raise metrics.NonFiniteError(
                f"step {step}: {', '.join(bad)} not finite; "
                + ", ".join(f"{name} = {value:.6g}" for name, value in losses.items())
            )
        self._averages.add(values)
        if self._compile_seconds is not None:
            self._stopwatch.step()
        if step % self._options.log_every == 0 or step == self._options.total_steps:
            line = self._averages.pop() | self._stopwatch.pop(step)
            log.info(
                "%s",
                metrics.progress_line(step, self._options.total_steps, line, self._stage.headline),
            )
            self._writer.scalars(step, line)

    def _write_report(self, step: int) -> epath.Path:
        path = self._workdir / "report.html"
        if jax.process_index() == 0:
            facts = {"stage": self._stage.name, "step": f"{step} of {self._options.total_steps}"}
            for name, value in self._stopwatch.summary().items():
                facts[name.removeprefix("perf/").replace("_", " ")] = f"{value:.4g}"
            if self._compile_seconds is not None:
                facts["first step with compilation"] = metrics.duration(self._compile_seconds)
            facts["devices"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
            facts["start"] = self._origin
            notes = [*self._stage.notes]
            if self._stage.final_notes is not None:
                notes += self._stage.final_notes()
            self._writer.flush()
            report.write_report(self._workdir, self._writer.history, facts, self._config, notes)
        return path


def non_finite_arrays(tree: Any) -> list[str]:
    """Returns the names of the floating arrays that hold a NaN or an infinity."""
    named = jax.tree_util.tree_flatten_with_path(tree)[0]
    floats = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in named
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    good = jax.device_get(_all_finite([leaf for _, leaf in floats]))
    return [name for (name, _), is_good in zip(floats, good, strict=True) if not is_good]


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def log_parameters(params: Any) -> None:
    """Logs how many parameters each top-level part has."""
    parts = params.items() if isinstance(params, Mapping) else [("all", params)]
    counts = {name: parameter_overview.count_parameters(part) for name, part in parts}
    text = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    log.info("parameters: %s; total %s", text, f"{sum(counts.values()):,}")
