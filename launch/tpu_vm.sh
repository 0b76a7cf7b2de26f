#!/usr/bin/env bash
# Trains on a Cloud TPU VM pod, requested as a queued resource.
#   launch/tpu_vm.sh create      requests the pod
#   launch/tpu_vm.sh wait        waits until the pod is active
#   launch/tpu_vm.sh install     waits for the pod, then installs this checkout on all workers
#   launch/tpu_vm.sh run ARGS    trains on all workers, in the background; ARGS go to
#                                tokenflow_jax.main; requires --workdir=gs://BUCKET/RUN
#   launch/tpu_vm.sh tail        follows the log of the first worker
#   launch/tpu_vm.sh status      prints the state of the pod and of every worker
#   launch/tpu_vm.sh stop        saves and ends the run; `run` with the same arguments continues it
#   launch/tpu_vm.sh delete      deletes the pod
#   launch/tpu_vm.sh keep ARGS   does all of this until the run is done: creates the pod, installs,
#                                runs; a preempted pod is requested again and the run continues
# --dry-run, anywhere, prints the commands without running them.
#
# Environment:
#   TPU_NAME, ZONE, PROJECT, TPU_TYPE   such as tokenflow us-east5-a my-project v5p-128
#   SLICES            pods that train together (default: 1)
#   RUNTIME_VERSION   the VM image (default: chosen by TPU_TYPE)
#   TPU_CREATE_FLAGS  more flags for create, such as "--spot --service-account=NAME"
#   TPU_SSH_FLAGS     more flags for ssh and scp, such as "--tunnel-through-iap"
#   TOKENFLOW_FLAGS   off: without the flags of launch/flags
#   POLL              seconds between two checks of the pod (default: 30)
#   MAX_RESTARTS      limit of `keep` on new pods plus new starts (default: 100)
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
set -- ${ARGS[@]+"${ARGS[@]}"}

SLICES="${SLICES:-1}"
POLL="${POLL:-30}"
MAX_RESTARTS="${MAX_RESTARTS:-100}"
read -r -d "" -a create_flags <<<"${TPU_CREATE_FLAGS:-}" || true # at the end of the text
read -r -d "" -a ssh_flags <<<"${TPU_SSH_FLAGS:-}" || true
packed=0 restarts=0 failed_before=0

# qr VERB WORD...: calls gcloud on the queued resource.
qr() {
  call gcloud compute tpus queued-resources "$@" "--zone=$ZONE" "--project=$PROJECT" --quiet
}

# everywhere COMMAND: runs a command on all workers of all slices.
everywhere() {
  qr ssh "$TPU_NAME" --node=all --worker=all ${ssh_flags[@]+"${ssh_flags[@]}"} "--command=$1"
}

# Prints the VM image for TPU_TYPE.
runtime_version() {
  case "$TPU_TYPE" in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
  esac
}

create() {
  local nodes=("--node-id=$TPU_NAME")
  ((SLICES == 1)) || nodes=("--node-count=$SLICES" "--node-prefix=$TPU_NAME")
  qr create "$TPU_NAME" "--accelerator-type=$TPU_TYPE" "--runtime-version=$RUNTIME_VERSION" \
    "${nodes[@]}" ${create_flags[@]+"${create_flags[@]}"}
}

# Prints the state of the pod, nothing if it does not exist. Uses `list` because `describe` fails the
# same way for a pod that does not exist and for a request that went wrong.
pod_state() {
  QUIET=1 qr list "--format=value(name.basename(),state.state)" |
    awk -v name="$TPU_NAME" '$1 == name { print $2 }'
}

wait_for_pod() {
  local state previous=""
  if ((DRY_RUN)); then
    qr list "--format=value(name.basename(),state.state)"
    return
  fi
  while true; do
    state="$(pod_state)" || fail "gcloud cannot list $TPU_NAME"
    [[ $state == "$previous" ]] || note "$TPU_NAME is ${state:-missing}"
    case "$state" in
      ACTIVE) return 0 ;;
      "") fail "there is no $TPU_NAME in $ZONE: run $0 create" ;;
      FAILED | SUSPEND* | DELETING) fail "$TPU_NAME is $state and will not start: run $0 delete, then create" ;;
    esac
    previous="$state"
    sleep "$POLL"
  done
}

install() {
  if ((!packed)); then make_scratch && pack "$SCRATCH/tokenflow.tar.gz" || return; fi
  packed=1 # `keep` installs the same code on later pods
  qr scp "$SCRATCH/tokenflow.tar.gz" "$TPU_NAME:tokenflow.tar.gz" --node=all --worker=all \
    ${ssh_flags[@]+"${ssh_flags[@]}"} || return
  everywhere "test ! -e tokenflow || bash tokenflow/launch/worker.sh idle && rm -rf tokenflow \
&& mkdir tokenflow && tar -xzf tokenflow.tar.gz -C tokenflow \
&& bash tokenflow/launch/worker.sh install"
}

start() {
  local settings=""
  [[ ${TOKENFLOW_FLAGS:-} != off ]] || settings="TOKENFLOW_FLAGS=off "
  everywhere "${settings}bash tokenflow/launch/worker.sh start $(quoted "$@")"
}
stop() { everywhere "bash tokenflow/launch/worker.sh stop"; }
delete() { qr delete "$TPU_NAME" --force; }

follow_log() {
  qr ssh "$TPU_NAME" --node=0 --worker=0 ${ssh_flags[@]+"${ssh_flags[@]}"} \
    "--command=tail -n 100 -F tokenflow_run/log"
}

status() {
  local state
  if ((DRY_RUN)); then
    wait_for_pod
  else
    state="$(pod_state)"
    echo "$TPU_NAME: ${state:-missing}"
    [[ $state == ACTIVE ]] || return 0
  fi
  worker_status
}

# worker_status [ARGS]: prints one line per worker; see worker.sh.
worker_status() {
  everywhere "if test -e tokenflow_run; then bash tokenflow/launch/worker.sh status \
$(quoted "$@"); else echo tokenflow: absent; fi"
}

# step ARGS: checks the pod and its workers once and does what is needed. Returns 0 when the run is
# done, 75 to go on, another code when the check itself failed.
step() {
  local state workers
  state="$(pod_state)" || return 1
  case "$state" in
    ACTIVE) ;;
    "") count_restart "requesting a pod" && create && return 75 || return 1 ;;
    SUSPENDED | FAILED) note "$TPU_NAME is $state" && delete && return 75 || return 1 ;;
    *) return 75 ;; # waiting for resources, being created or being taken away
  esac
  if ! workers="$(QUIET=1 worker_status "$@" 2>&1)"; then
    note "$workers"
    return 1
  fi
  workers="$(sed -n 's/^tokenflow: //p' <<<"$workers" | sort -u)" # each state once
  case $'\n'"$workers"$'\n' in
    $'\n\n') return 1 ;;
    *running*) ;; # when one worker has ended, the others follow soon
    *absent*) install && start "$@" || return 1 ;;
    $'\nexit 0\n') return 0 ;;
    *none* | *lost* | *"exit 12"[89]* | *"exit 1"[3-9][0-9]* | *"exit 2"[0-9][0-9]*) # or a signal
      count_restart "starting the run; it was: ${workers//$'\n'/, }" && start "$@" || return 1
      ;;
    *) # Training failed, or the pod is being taken away and its state does not show it yet.
      ((failed_before)) || { failed_before=1 && return 75; }
      note "the run failed with ${workers//$'\n'/, }; see its log with $0 tail"
      exit "${workers##*exit }"
      ;;
  esac
  failed_before=0
  return 75
}

# count_restart WHY: counts a new pod or a new start, up to MAX_RESTARTS.
count_restart() {
  ((restarts++ <= MAX_RESTARTS)) || fail "gave up after MAX_RESTARTS=$MAX_RESTARTS restarts"
  note "$@"
}

keep() {
  local code errors=0
  if ((DRY_RUN)); then
    create && wait_for_pod && install && start "$@"
    echo "# every $POLL s, until the run is done:"
    wait_for_pod && worker_status "$@"
    echo "# after a preemption, followed by all of the above:"
    delete
    return
  fi
  while true; do
    code=0
    step "$@" || code=$?
    case "$code" in
      0) note "the run is done; delete the pod with $0 delete" && return ;;
      75) errors=0 ;;
      *) ((++errors < 10)) || fail "gave up: ten checks in a row failed, the last with code $code" ;;
    esac
    sleep "$POLL"
  done
}

verb="${1:-}"
(($#)) && shift
case "$verb" in
  run | keep) need_shared_workdir "$@" ;;
  create | wait | install | tail | status | stop | delete)
    (($# == 0)) || wrong_use "$verb takes no arguments, not $1" ;;
  *) wrong_use "give one of: create, wait, install, run, tail, status, stop, delete, keep" ;;
esac
need TPU_NAME "a name for the pod, such as tokenflow"
need ZONE "such as us-east5-a; see: gcloud compute tpus accelerator-types list --zone=ZONE"
need PROJECT "the Google Cloud project; see: gcloud config get project"
need_program gcloud "see https://cloud.google.com/sdk/docs/install"
need_number SLICES
need_number POLL 0
need_number MAX_RESTARTS 0
if [[ $verb == create || $verb == keep ]]; then
  need TPU_TYPE "the accelerator type, such as v5p-128 or v6e-16"
  if [[ -n ${TPU_TYPE:-} ]]; then
    RUNTIME_VERSION="${RUNTIME_VERSION:-$(runtime_version)}"
    need RUNTIME_VERSION "there is none for TPU_TYPE=$TPU_TYPE; for TPU7x and later use launch/gke_xpk.sh"
  fi
fi
check_needs

case "$verb" in
  create | status | stop | delete | keep) "$verb" "$@" ;;
  wait) wait_for_pod ;;
  install) wait_for_pod && install ;;
  run) start "$@" ;;
  tail) follow_log ;;
esac
