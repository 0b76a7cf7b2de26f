"""Weights & Biases as a further place for curves and grids: config.wandb.project."""

import os
import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from tokenflow_jax import remote
from tokenflow_jax.log import log
from tokenflow_jax.messages import one_line


def project_of(config: Mapping[str, Any]) -> str:
    """Return the project that a run's curves also go to, "" for none, if the package is there."""
    project = (config.get("wandb") or {}).get("project") or ""
    if project:
        try:
            from wandb import init  # noqa: F401 - a folder named wandb can be imported, too
        except ImportError as error:
            raise ValueError(
                f"config.wandb.project={project} needs the package wandb: pip install "
                "'tokenflow_jax[wandb]', or leave it empty"
            ) from error
    return project


def opened(config: Mapping[str, Any], workdir: epath.Path, resume_step: int) -> list["WandbRun"]:
    """Return the run there, if the config names a project."""
    project = project_of(config)
    return [WandbRun(project, workdir, config, resume_step)] if project else []


class WandbRun:
    """A run there, which a continued run goes on with; its variables (WANDB_MODE, ...) hold.

    What fails later ends the recording there, not the training.
    """

    def __init__(
        self, project: str, workdir: epath.Path, config: Mapping[str, Any], resume_step: int
    ):
        import wandb

        self._wandb, self._failed, known = wandb, False, workdir / "wandb_id"
        if not (resume_step and known.exists()):
            known.write_text(secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=project,
                name=workdir.name,
                dir=None if remote.is_remote(workdir) else os.fspath(workdir),
                id=known.read_text(),
                resume="allow",
                config=dict(config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f"config.wandb.project={project}: {one_line(error)}; WANDB_MODE=offline needs no "
                "login"
            ) from error
        # Steps may repeat after a kill: wandb's own would drop them.
        self._run.define_metric("*", step_metric="step")
        log.info("Weights & Biases: %s", self._run.dir if self._run.offline else self._run.url)

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._log({"step": step, **scalars})

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        self._log({"step": step, name: self._wandb.Image(image_HWC, caption=f"step {step}")})

    def flush(self) -> None:
        """Do nothing: it is sent as it comes."""

    def close(self) -> None:
        if not self._failed:
            self._run.finish()

    def _log(self, values: Mapping[str, Any]) -> None:
        if self._failed:
            return
        try:
            self._run.log(dict(values))
        except Exception as error:
            self._failed = True
            log.warning("nothing more goes to Weights & Biases: %s", one_line(error))
