#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster through XPK (pip install xpk).
#   launch/gke_xpk.sh run ARGS   ARGS go to tokenflow_jax.main; --workdir=gs://BUCKET/RUN
#   launch/gke_xpk.sh status     lists the cluster's workloads
#   launch/gke_xpk.sh delete     ends the workload; `run` with the same arguments continues it
# --dry-run, anywhere, prints the commands without running them. When a worker is preempted or killed,
# the workload restarts and continues from the workdir; when a worker fails, the workload ends.
#
# Environment:
#   CLUSTER, ZONE, PROJECT   the cluster; `xpk cluster create` makes one
#   WORKLOAD                 name of the run: lower-case letters, digits, hyphens
#   TPU_TYPE                 such as v5p-128, v6e-256, tpu7x-128
#   SLICES                   TPU slices that train together (default: 1)
#   IMAGE                    a container image with tokenflow_jax[tpu] and etils[epath-gcs]; without
#                            it, this checkout is added to BASE_IMAGE and installed at the start
#   BASE_IMAGE               (default: python:3.12)
#   MAX_RESTARTS             (default: 100)
#   SAVE_SECONDS             time that a preempted worker gets to save (default: 120)
#   TOKENFLOW_FLAGS          off: without the flags of launch/flags
#   XPK_FLAGS                more flags for `xpk workload create`, such as "--priority=high"
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
set -- ${ARGS[@]+"${ARGS[@]}"}

SLICES="${SLICES:-1}"
MAX_RESTARTS="${MAX_RESTARTS:-100}"
SAVE_SECONDS="${SAVE_SECONDS:-120}"
read -r -d "" -a xpk_flags <<<"${XPK_FLAGS:-}" || true # at the end of the text

run() {
  local train flags image folder
  train="exec env TOKENFLOW_SIGTERM_CODE=$SIGTERM_CODE"
  flags="$(flags_for "$TPU_TYPE")"
  # The container's own value comes last and wins.
  [[ -z $flags ]] || train+=" LIBTPU_INIT_ARGS=\"$flags \${LIBTPU_INIT_ARGS:-}\""
  train+=" python -m tokenflow_jax.main --distributed $(quoted "$@")"
  if [[ -n ${IMAGE:-} ]]; then
    image=("--docker-image=$IMAGE")
  else
    make_scratch
    folder="$SCRATCH/tokenflow"
    call mkdir "$folder"
    pack "$folder.tar.gz"
    call tar -xzf "$folder.tar.gz" -C "$folder"
    image=("--base-docker-image=${BASE_IMAGE:-python:3.12}" "--script-dir=$folder")
    train="pip install -q -e '.[tpu]' 'etils[epath-gcs]' && $train"
  fi
  call xpk workload create "--workload=$WORKLOAD" "--tpu-type=$TPU_TYPE" "--num-slices=$SLICES" \
    "${where[@]}" "${image[@]}" "--max-restarts=$MAX_RESTARTS" \
    "--termination-grace-period-seconds=$SAVE_SECONDS" \
    ${xpk_flags[@]+"${xpk_flags[@]}"} "--command=$train"
}

verb="${1:-}"
(($#)) && shift
case "$verb" in
  run)
    need_shared_workdir "$@"
    need WORKLOAD "a name for the run, such as tokenflow-b"
    need TPU_TYPE "such as v5p-128, v6e-256, tpu7x-128"
    need_number SLICES
    need_number MAX_RESTARTS 0
    need_number SAVE_SECONDS
    check_name IMAGE /@
    check_name BASE_IMAGE /@
    ;;
  status | delete)
    (($# == 0)) || wrong_use "$verb takes no arguments, not $1"
    [[ $verb == status ]] || need WORKLOAD "the name of the run to end"
    ;;
  *) wrong_use "give one of: run, status, delete" ;;
esac
need CLUSTER "the GKE cluster; see: xpk cluster list --project=PROJECT --zone=ZONE"
need ZONE "the cluster's zone or region, such as us-east5-a"
need PROJECT "the Google Cloud project; see: gcloud config get project"
need_program xpk "pip install xpk"
check_needs

where=("--cluster=$CLUSTER" "--zone=$ZONE" "--project=$PROJECT")
case "$verb" in
  run) run "$@" ;;
  status) call xpk workload list "${where[@]}" ;;
  delete) call xpk workload delete "--workload=$WORKLOAD" "${where[@]}" --force ;;
esac
