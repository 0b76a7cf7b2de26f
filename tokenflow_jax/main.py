"""Train a stage of TokenFlow; the same command continues a run that was stopped.

  python -m tokenflow_jax.main --config=configs/tokenizer.py            the quickstart
  python -m tokenflow_jax.main --config=tokenizer:b                     another variant
  python -m tokenflow_jax.main --config=tokenizer --config.total_steps=100

Exit codes: 0 done, or stopped and saved on SIGTERM; 1 training failed (a loss that is not finite, a
full disk); 2 wrong flags or config; 130 stopped and saved on Ctrl-C. $TOKENFLOW_SIGTERM_CODE, if
set, replaces 0 when SIGTERM stopped an unfinished run (launch/ sets 143, so that schedulers start
it again).
"""

import errno
import functools
import os
import sys
import time
import traceback
from pathlib import Path

from absl import flags

from tokenflow_jax import cli, config_flag, files, stages
from tokenflow_jax.log import log
from tokenflow_jax.parallel import distributed
from tokenflow_jax.train.run_config import refuse_old_keys
from tokenflow_jax.train.wandb_run import project_of

_BEGAN = time.perf_counter()


def main(options: flags.FlagValues) -> int:
    """Train the stage of the config and return the exit code."""
    config = options.config
    workdir = options.workdir or default_workdir(config_flag.name(options))
    from tokenflow_jax.parallel import mesh  # here, so that a wrong flag is reported at once
    from tokenflow_jax.train import checkpoint, loop, metrics, profile
    from tokenflow_jax.train.workdir import check_path

    profile_steps = profile.parse_steps(options.profile_steps)
    loop.LoopOptions.from_config(config)
    refuse_old_keys(config)
    project_of(config)
    with config.unlocked():
        config.config_file = config_flag.name(options)  # for model cards
    stage = stages.make_stage(config, mesh.make_mesh(config.get("mesh") or {}))
    check_path(workdir)
    try:  # before minutes of loading
        files.writable_folder(workdir)
    except OSError as error:
        cause = error.__cause__
        problem = isinstance(cause, OSError) and _workdir_problem(cause, workdir)
        log.error("%s", problem or error)
        return _leave("its workdir cannot be written")
    if loop.is_finished(config, workdir):
        path = files.as_path(workdir)
        log.info("done at step %d: checkpoint and report in %s", config.total_steps, path)
        return 0
    stage.open()
    try:
        result = loop.train_and_evaluate(config, workdir, stage, profile_steps, _BEGAN)
    except metrics.NonFiniteError as error:  # in all processes alike
        log.error("%s", error)
        return 1
    except checkpoint.CheckpointError as error:
        log.error("%s", error)
        return _leave("checkpoint error")
    except OSError as error:
        log.error("%s", _workdir_problem(error, workdir) or error)
        return _leave("a file cannot be used")
    except Exception as error:
        expected = isinstance(error, ValueError) and _is_ours(error)
        log.error("training failed: %s", error, exc_info=None if expected else error)
        return _leave("it failed as above; if a collective failed, another process was lost")
    if result.stopped_by == "SIGTERM" and not result.complete:
        return int(os.environ.get("TOKENFLOW_SIGTERM_CODE", "0"))
    return 130 if result.stopped_by == "SIGINT" else 0


def _leave(cause: str) -> int:
    distributed.leave(cause)  # does not return where other processes wait for this one
    return 1


def _is_ours(error: Exception) -> bool:
    """Tell whether this package raised an error: its text is then all that the user needs."""
    file = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(__file__).parent in Path(file).parents


def _workdir_problem(error: OSError, workdir: str) -> str | None:
    """Phrase an error of the disk or the workdir; None if it is about another file."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {workdir} is full: free some space, run the same again"
    if not isinstance(error.filename, str | os.PathLike):
        return None
    file, folder = Path(error.filename).absolute(), Path(workdir).absolute()
    if folder == file or folder in file.parents or file in folder.parents:
        return f"the workdir {workdir} cannot be used ({error}); give another --workdir"
    return None


def default_workdir(config_file: str) -> str:
    """Return `runs/name` or `runs/name-variant`, so that the same command finds it again."""
    path, _, variant = config_file.partition(":")
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in variant)
    return str(Path("runs") / (Path(path).stem + (f"-{safe}" if safe else "")))


def define_flags(define: cli.Define) -> None:
    define.string("workdir", None, "Where checkpoints, curves and the report go; by default "
                  "runs/<config>-<variant>.")  # fmt: skip
    define.string(
        "profile_steps", None, "START:COUNT: trace these steps for xprof, in the workdir."
    )


run = functools.partial(cli.run, "tokenflow_jax", main, define_flags, config=True)

if __name__ == "__main__":
    sys.exit(run())
