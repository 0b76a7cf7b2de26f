"""Trains a stage of TokenFlow: one command for all of them.

  python -m tokenflow_jax.main --config=configs/tokenizer.py            the quickstart
  python -m tokenflow_jax.main --config=configs/tokenizer.py:b          another variant
  python -m tokenflow_jax.main --config=configs/tokenizer.py --config.total_steps=100

The same command continues a run that was stopped. Exit codes: 0 done, or stopped and saved on
SIGTERM; 1 training failed (a loss that is not finite, a full disk); 2 wrong flags or config;
130 stopped and saved on Ctrl-C. $TOKENFLOW_SIGTERM_CODE, if set, takes the place of 0 when SIGTERM
stopped a run that was not done (launch/ sets 143, so that schedulers start it again).
"""

import errno
import os
import traceback
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging

from tokenflow_jax import cli, stages
from tokenflow_jax.cli import fail
from tokenflow_jax.parallel import distributed
from tokenflow_jax.train.run_config import refuse_old_keys

_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where checkpoints, curves and the report go; runs/<config>-<variant> by default.",
)
distributed.define_flags()


def main(argv: Sequence[str]) -> int:
    """Trains the stage of the config; returns the exit code."""
    if len(argv) > 1:
        fail(f"unexpected argument {argv[1]!r}; options begin with --")
    config = cli.CONFIG.value
    workdir = _WORKDIR.value or default_workdir(cli.config_file())
    import jax  # here, so that a wrong flag is reported at once

    try:
        distributed.start(flags.FLAGS)
    except ValueError as error:
        fail(str(error))
    from tokenflow_jax import log as runlog
    from tokenflow_jax.parallel import mesh
    from tokenflow_jax.train import checkpoint, loop, metrics

    runlog.set_up(verbose=jax.process_index() == 0)
    try:
        loop.LoopOptions.from_config(config)
        refuse_old_keys(config)
        stage = stages.make_stage(config, mesh.make_mesh(config.get("mesh") or {})).open()
    except (ValueError, OSError) as error:
        if absl_logging.level_debug():
            raise
        fail(str(error))
    try:
        result = loop.train_and_evaluate(config, workdir, stage)
    except metrics.NonFiniteError as error:  # in all processes alike
        runlog.log.error("%s", error)
        return 1
    except checkpoint.CheckpointError as error:
        runlog.log.error("%s", error)
        distributed.leave("it cannot go on with its checkpoints")
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        runlog.log.error("the disk of %s is full: free some space, run the same again", workdir)
        distributed.leave("its disk is full")
        return 1
    except Exception:
        if jax.process_count() > 1:
            traceback.print_exc()
        distributed.leave("it failed as above; if a collective failed, another process was lost")
        raise
    if result.stopped_by == "SIGTERM" and int(result.state.step) < config.total_steps:
        return int(os.environ.get("TOKENFLOW_SIGTERM_CODE", "0"))
    return 130 if result.stopped_by == "SIGINT" else 0


def default_workdir(config_file: str) -> str:
    """Names the workdir after the config, so that the same command finds it again.

    Args:
      config_file: `path/to/name.py` or `path/to/name.py:variant`.

    Returns:
      `runs/name` or `runs/name-variant`, the variant with file-safe characters only.
    """
    path, _, variant = config_file.partition(":")
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in variant)
    return str(Path("runs") / (Path(path).stem + (f"-{safe}" if safe else "")))


def run() -> None:
    """Entry point of `python -m tokenflow_jax.main`."""
    absl_logging.set_verbosity(absl_logging.WARNING)  # of libraries; the run has its own log
    app.run(main, flags_parser=cli.parse_flags)


if __name__ == "__main__":
    run()
