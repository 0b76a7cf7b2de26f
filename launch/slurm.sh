#!/usr/bin/env bash
# Trains on GPU nodes of a SLURM cluster, one process per GPU. Submits a job; inside of one (of
# salloc, too) it starts the processes.
#   launch/slurm.sh [--dry-run] ARGS   the arguments of tokenflow_jax.main; the workdir must be on
#                                      a file system that all nodes share, or gs://
# A job that is preempted, loses a node or nears its time limit saves and is queued again; it then
# continues from the workdir. `scancel` ends it.
#
# Environment; partition, account, time limit and the like are sbatch's own SBATCH_PARTITION, ...:
#   NODES, GPUS      nodes, and GPUs of each
#   CPUS_PER_TASK    CPU cores per GPU (what the cluster gives)
#   JOB_NAME         (tokenflow)
#   SAVE_SECONDS     how long before the time limit the run is told to save (300)
#   PYTHON           the interpreter on the nodes (python)
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
set -- ${ARGS[@]+"${ARGS[@]}"}

cpus=()
[[ -z ${CPUS_PER_TASK:-} ]] || cpus=("--cpus-per-task=$CPUS_PER_TASK")

submit() {
  # --wrap, since sbatch copies a script away from common.sh.
  call sbatch "--job-name=${JOB_NAME:-tokenflow}" "--nodes=$NODES" "--gpus-per-node=$GPUS" \
    "--ntasks-per-node=$GPUS" ${cpus[@]+"${cpus[@]}"} --requeue \
    "--signal=TERM@${SAVE_SECONDS:-300}" --open-mode=append "--output=%x-%j.log" \
    "--wrap=exec env TOKENFLOW_BATCH=1 bash $(quoted "$ROOT/launch/slurm.sh" "$@")"
  if ((DRY_RUN)); then
    echo "# in the job:"
    run "$@"
  fi
}

run() {
  local code=0
  # Every process must see all GPUs of its node: JAX takes the one with its local number.
  call srun --kill-on-bad-exit=1 --gpu-bind=none ${cpus[@]+"${cpus[@]}"} \
    env "TOKENFLOW_SIGTERM_CODE=$SIGTERM_CODE" "${PYTHON:-python}" -m tokenflow_jax.main \
    --distributed "$@" || code=$?
  if ((code == SIGTERM_CODE)) && [[ -n ${TOKENFLOW_BATCH:-} ]]; then
    # SLURM told it to save. scancel or a preemption ends this script as well, within a minute as
    # a rule; whoever is still here was near the time limit.
    sleep "${SETTLE_SECONDS:-60}"
    call scontrol requeue "$SLURM_JOB_ID"
  fi
  return "$code"
}

if [[ -n ${SLURM_JOB_ID:-} ]]; then
  need_program srun "a SLURM cluster has it"
  check_needs
  run "$@"
else
  need NODES "how many nodes"
  need GPUS "how many GPUs each of them has"
  need_program sbatch "run this on a login node of a SLURM cluster"
  check_needs
  submit "$@"
fi
