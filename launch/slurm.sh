#!/usr/bin/env bash
# Trains on GPU nodes of a SLURM cluster, one process per GPU. Submits a job; inside a job (or an
# salloc session) it starts the processes.
#   launch/slurm.sh [--dry-run] ARGS   ARGS go to tokenflow_jax.main; the workdir must be on a file
#                                      system that all nodes share, or gs://
# A job that is preempted, loses a node or nears its time limit saves and is requeued, and then
# continues from the workdir. `scancel` ends it.
#
# Environment (sbatch itself reads SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT and the like):
#   NODES, GPUS      number of nodes, and of GPUs per node
#   CPUS_PER_TASK    CPU cores per GPU (default: the cluster's)
#   JOB_NAME         (default: tokenflow)
#   SAVE_SECONDS     seconds before the time limit at which the run is told to save (default: 300)
#   PYTHON           the interpreter on the nodes (default: python)
#   TOKENFLOW_FLAGS  off: without the flags of launch/flags/gpu
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
set -- ${ARGS[@]+"${ARGS[@]}"}

JOB_NAME="${JOB_NAME:-tokenflow}"
SAVE_SECONDS="${SAVE_SECONDS:-300}"
SETTLE_SECONDS="${SETTLE_SECONDS:-60}"
cpus=()
if [[ -n ${CPUS_PER_TASK:-} ]]; then
  need_number CPUS_PER_TASK
  cpus=("--cpus-per-task=$CPUS_PER_TASK")
fi

submit() {
  # --wrap, because sbatch would copy this script away from common.sh.
  call sbatch "--job-name=$JOB_NAME" "--nodes=$NODES" "--gpus-per-node=$GPUS" \
    "--ntasks-per-node=$GPUS" ${cpus[@]+"${cpus[@]}"} --requeue \
    "--signal=TERM@$SAVE_SECONDS" --open-mode=append "--output=%x-%j.log" \
    "--wrap=exec env TOKENFLOW_BATCH=1 bash $(quoted "$ROOT/launch/slurm.sh" "$@")"
  if ((DRY_RUN)); then
    echo "# in the job:"
    run "$@"
  fi
}

run() {
  local code=0
  # Every process must see all GPUs of its node: JAX takes the one with its local rank.
  call srun --kill-on-bad-exit=1 --gpu-bind=none ${cpus[@]+"${cpus[@]}"} \
    env "TOKENFLOW_SIGTERM_CODE=$SIGTERM_CODE" "${PYTHON:-python}" -m tokenflow_jax.main \
    --distributed "$@" || code=$?
  if ((code == SIGTERM_CODE)) && [[ -n ${TOKENFLOW_BATCH:-} ]]; then
    # SLURM told the run to save. After scancel or a preemption this script is killed too, usually
    # within a minute; if it is still alive then, the job neared its time limit.
    sleep "$SETTLE_SECONDS"
    call scontrol requeue "$SLURM_JOB_ID"
  fi
  return "$code"
}

if [[ -n ${SLURM_JOB_ID:-} ]]; then
  need_number SETTLE_SECONDS 0
  need_program srun "run this on a SLURM cluster"
  check_needs
  use_flags gpu # srun passes the environment on
  run "$@"
else
  for name in NODES GPUS SAVE_SECONDS; do
    if [[ -n ${!name:-} ]]; then need_number "$name"; fi
  done
  need NODES "the number of nodes"
  need GPUS "the number of GPUs per node"
  check_name JOB_NAME
  need_program sbatch "run this on a login node of a SLURM cluster"
  check_needs
  submit "$@"
fi
