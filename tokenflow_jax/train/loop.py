"""The one training loop; read `train_and_evaluate` from top to bottom."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from tokenflow_jax import files
from tokenflow_jax.log import log
from tokenflow_jax.parallel import hosts
from tokenflow_jax.train import checkpoint, checkpoint_info, curves, metrics
from tokenflow_jax.train.prefetch import DevicePrefetcher
from tokenflow_jax.train.recorder import Recorder, Start, log_parameters
from tokenflow_jax.train.run_config import LoopOptions, config_differences, config_to_dict
from tokenflow_jax.train.stage import Stage, State
from tokenflow_jax.train.stopping import StopSignals
from tokenflow_jax.train.workdir import lock


class Result(NamedTuple):
    """The end of a run."""

    state: State
    stopped_by: str | None = None  # name of the signal
    complete: bool = True  # all steps and the last evaluation are done


def train_and_evaluate(
    config: Any,
    workdir: str | epath.Path,
    stage: Stage,
    profile_steps: tuple[int, int] | None = None,
    began: float | None = None,
) -> Result:
    """Train a stage to config.total_steps, from scratch or continuing in `workdir`.

    The state comes from the first of these that applies:
      1. the latest complete checkpoint in the workdir: state, position in the data, step; the run
         goes on as if it had never stopped, bit for bit;
      2. config.init_from (another run's or pretrained weights): a fresh state with those weights,
         step 0, new data;
      3. scratch: stage.init().
    On SIGTERM or Ctrl-C the running step is finished and saved, and the function returns.

    Args:
      config: ConfigDict; the loop reads the fields of LoopOptions, the rest is the stage's.
      workdir: where checkpoints, curves, grids and the report go.
      stage: an open stage (see `Stage.open`).
      profile_steps: the first step to trace, and how many; see `profile.Profiler`.
      began: `time.perf_counter()` when the program started, for the share of training in the time.

    Raises:
      NonFiniteError: a loss or the state is NaN or infinite; nothing of it was saved.
      CheckpointError: a checkpoint could not be written, or does not fit.
      ValueError: bad options.
    """
    options = LoopOptions.from_config(config)
    saved_config = config_to_dict(config)
    with lock(workdir) as held, StopSignals() as stop:
        checkpoints = checkpoint.Checkpoints(workdir, options.keep_checkpoints)
        data = DevicePrefetcher(stage.data(), stage.batch_sharding)
        start = restore_or_initialize(saved_config, stage, checkpoints, data)
        state, step = start.state, int(start.state.step)
        recorder = Recorder(
            stage, options, held, checkpoints, saved_config, start, profile_steps, began
        )
        stage.between_batches = stop.check
        try:
            if step:  # killed after the save and before the evaluation of this step
                recorder.evaluate_if_due(step, state)
            while step < options.total_steps and not stop.requested():
                batch = next(data)  # already on the device, unless the data is too slow
                recorder.before_step(step + 1, state, batch)
                state, scalars = stage.step(state, batch)
                step += 1
                # Fetches the scalars of the step before, while the device works on this one.
                recorder.after_dispatch(step, scalars, data.last_wait)
                if options.due(options.checkpoint_every, step):
                    recorder.save(step, state, data)  # first: an evaluation may fail, or be stopped
                recorder.evaluate_if_due(step, state)
            if step != checkpoints.latest_step():
                recorder.save(step, state, data)
            checkpoints.wait()
            recorder.finish(step, stop.name)
        except metrics.NonFiniteError as error:
            raise recorder.explain_non_finite(error) from error
        finally:
            recorder.close()
            data.close()
            checkpoints.close()
    return Result(state, stop.name, recorder.complete)


def is_finished(config: Any, workdir: str | epath.Path) -> bool:
    """Tell, before anything is loaded, whether the same run in `workdir` has nothing left to do.

    It has its last checkpoint, the last evaluation and its pictures. What a stage fills into the
    model and the tokenizer of a config (0, "", ()) may differ. All processes must call this
    together.
    """
    workdir = files.absolute(workdir)
    total = LoopOptions.from_config(config).total_steps
    path = workdir / "checkpoints" / str(total)
    done = total in checkpoint_info.complete_steps(path.parent)
    if done:
        changes = config_differences(
            checkpoint_info.read_info(path)["config"], config_to_dict(config)
        )
        filled = ("model.", "tokenizer.")
        kept = (
            key
            for key, (_, new) in changes.items()
            if not _is_free(key) and not (key.startswith(filled) and new in (0, "", []))
        )
        evaluated = curves.read_history(workdir / "metrics.jsonl")
        done = (
            not any(kept)
            and any(n["step"] == total and any(k[:5] == "eval/" for k in n) for n in evaluated)
            and any(step == total for _, step, _ in curves.grid_files(workdir / "images"))
        )
    return bool(hosts.of_first_process(done))


# A change of these makes another run: the saved position or the weights would be misread.
IDENTITY_KEYS = ("stage", "seed", "batch_size", "model", "data", "text_tokenizer", "lora")
# Its weights may change; that its sources stay is checked with the position in the data.
MIXTURE = "data.mixture"
FINGERPRINT = ".fingerprint"  # and keys that end so: of a frozen network that the model reads
# These only decide what is recorded when.
FREE_KEYS = (
    "log_every", "eval_every", "image_every", "checkpoint_every", "keep_checkpoints", "eval",
    "init_from", "workdir", "mesh", "data.allow_outside", "data.threads", "tokenizer.absolute_path",
    "config_file", "wandb",
)  # fmt: skip


def restore_or_initialize(
    config: Mapping[str, Any],
    stage: Stage,
    checkpoints: checkpoint.Checkpoints,
    data: DevicePrefetcher,
) -> Start:
    """Return the state by the order of `train_and_evaluate`."""
    log_parameters(stage.state_shapes.params, checkpoints.directory.parent)
    step = checkpoints.latest_step()
    if step is not None:
        info, path = checkpoints.read_info(step), checkpoints.path(step)
        check_config_change(info["config"], config, path)
        state = checkpoints.restore(step, stage.state_shapes, data)
        origin = f"continued from checkpoint {path} (step {step})"
        return Start(state, origin, info.get("averages", {}))
    state = stage.init()
    if config.get("init_from"):
        state, text = stage.warm_start(state)
        return Start(state, f"warm start: {text}")
    return Start(state, "initialized from scratch")


def _is_free(key: str) -> bool:
    return key in FREE_KEYS or key.split(".")[0] in FREE_KEYS


def check_config_change(old: Mapping[str, Any], new: Mapping[str, Any], path: Any) -> None:
    """Compare the config of a checkpoint with that of the run that continues it.

    FREE_KEYS may change. Any other change is named in a warning, since the run is then no longer
    what an uninterrupted one would have been; a change of IDENTITY_KEYS or of a fingerprint raises
    CheckpointError, which lists all of them.
    """
    changes = config_differences(old, new)
    lines = {key: f"config.{key}: {a!r} -> {b!r}" for key, (a, b) in changes.items()}
    identity = [
        text
        for key, text in lines.items()
        if key not in FREE_KEYS
        and key != MIXTURE
        and (key.split(".")[0] in IDENTITY_KEYS or key.endswith(FINGERPRINT))
    ]
    if identity:
        raise checkpoint.CheckpointError(
            f"{path} was made with another model, data or seed:\n  - "
            + "\n  - ".join(identity)
            + f"\nUndo the change, or begin another --workdir with --config.init_from={path}."
        )
    free = [text for key, text in lines.items() if _is_free(key)]
    exact = [text for text in lines.values() if text not in free]
    if free:
        log.info("changed since the checkpoint: %s", "; ".join(free))
    if exact:
        log.warning(
            "changed since the checkpoint, so this run will differ from an uninterrupted one: %s",
            "; ".join(exact),
        )
