"""The one training loop: every stage gives it a `Stage` and it reads nothing else of it.

Read `train_and_evaluate` from top to bottom; the rest of the file are its parts.
"""

import dataclasses
import signal
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from tokenflow_jax.log import log
from tokenflow_jax.train import checkpoint, metrics
from tokenflow_jax.train.prefetch import DevicePrefetcher
from tokenflow_jax.train.recorder import Recorder, log_parameters
from tokenflow_jax.train.stage import LoopOptions, Stage, State


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
FINGERPRINT = ".fingerprint"  # and keys that end so: of a frozen network that the model reads
# These only say what is recorded when.
FREE_KEYS = (
    "log_every", "eval_every", "image_every", "checkpoint_every", "keep_checkpoints", "eval",
    "init_from", "workdir", "mesh",
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
      CheckpointError: one of IDENTITY_KEYS or a fingerprint changed; all changes are listed.
    """
    changes = checkpoint.config_differences(old, new)
    lines = {key: f"config.{key}: {a!r} -> {b!r}" for key, (a, b) in changes.items()}
    identity = [
        text
        for key, text in lines.items()
        if key.split(".")[0] in IDENTITY_KEYS or key.endswith(FINGERPRINT)
    ]
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
