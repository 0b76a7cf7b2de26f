#!/usr/bin/env bash
# Trains on a Cloud TPU VM pod that is asked for as a queued resource.
#   launch/tpu_vm.sh create      ask for the pod
#   launch/tpu_vm.sh wait        until it is there
#   launch/tpu_vm.sh install     this checkout, on all workers (waits for the pod)
#   launch/tpu_vm.sh run ARGS    train on all workers, in the background: the arguments of
#                                tokenflow_jax.main; --workdir=gs://BUCKET/RUN is a must
#   launch/tpu_vm.sh tail        follow the log of the first worker
#   launch/tpu_vm.sh status      of the pod and of every worker
#   launch/tpu_vm.sh stop        end the run, saved; `run` with the same arguments continues it
#   launch/tpu_vm.sh delete      give the pod back
#   launch/tpu_vm.sh keep ARGS   all of it until the run is done: creates the pod, installs, runs;
#                                a pod that was preempted is asked for again and the run continues
# --dry-run, anywhere, prints the commands and runs none.
#
# Environment:
#   TPU_NAME, ZONE, PROJECT, TPU_TYPE   such as tokenflow us-east5-a my-project v5p-128
#   SLICES            pods that train together (1)
#   RUNTIME_VERSION   the image; follows from TPU_TYPE
#   TPU_CREATE_FLAGS  further flags of create, such as "--spot --service-account=NAME"
#   TPU_SSH_FLAGS     further flags of ssh and scp, such as "--tunnel-through-iap"
#   POLL              seconds between two looks at the pod (30)
#   MAX_RESTARTS      of keep: new pods and new starts, together (100)
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"
set -- ${ARGS[@]+"${ARGS[@]}"}

SLICES="${SLICES:-1}"
POLL="${POLL:-30}"
MAX_RESTARTS="${MAX_RESTARTS:-100}"
read -r -a create_flags <<<"${TPU_CREATE_FLAGS:-}"
read -r -a ssh_flags <<<"${TPU_SSH_FLAGS:-}"
packed=0 restarts=0 failed_before=0

qr() { # VERB WORDS...: gcloud on the queued resource
  call gcloud compute tpus queued-resources "$@" "--zone=$ZONE" "--project=$PROJECT" --quiet
}

everywhere() { # COMMAND: on all workers of all slices
  qr ssh "$TPU_NAME" --node=all --worker=all ${ssh_flags[@]+"${ssh_flags[@]}"} "--command=$1"
}

# The image that belongs to a type of TPU.
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

# Prints the state of the pod, nothing if there is none. `list` because `describe` fails alike for
# a pod that does not exist and for one that cannot be asked about.
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
    state="$(pod_state)" || fail "gcloud cannot tell whether $TPU_NAME is there"
    [[ $state == "$previous" ]] || note "$TPU_NAME is ${state:-not there}"
    case "$state" in
      ACTIVE) return 0 ;;
      "") fail "there is no $TPU_NAME in $ZONE: $0 create" ;;
      FAILED | SUSPEND* | DELETING) fail "$TPU_NAME will not come: $0 delete, then create" ;;
    esac
    previous="$state"
    sleep "$POLL"
  done
}

install() {
  local folder="${TMPDIR:-/tmp}" archive
  archive="${folder%/}/tokenflow-$TPU_NAME.tar.gz"
  if ((!packed)); then pack "$archive" || return; fi
  packed=1 # a later pod of the same `keep` gets the same code
  qr scp "$archive" "$TPU_NAME:tokenflow.tar.gz" --node=all --worker=all \
    ${ssh_flags[@]+"${ssh_flags[@]}"} || return
  everywhere "test ! -e tokenflow || bash tokenflow/launch/worker.sh idle && rm -rf tokenflow \
&& mkdir tokenflow && tar -xzf tokenflow.tar.gz -C tokenflow \
&& bash tokenflow/launch/worker.sh install"
}

start() { everywhere "bash tokenflow/launch/worker.sh start $(quoted "$@")"; }
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
    echo "$TPU_NAME: ${state:-not there}"
    [[ $state == ACTIVE ]] || return 0
  fi
  worker_status
}

# worker_status [ARGS]: one line per worker; see worker.sh.
worker_status() {
  everywhere "if test -e tokenflow_run; then bash tokenflow/launch/worker.sh status \
$(quoted "$@"); else echo tokenflow: absent; fi"
}

# look ARGS: one look at the pod, and what follows from it. Returns 0 when the run is done, 75
# when there is more to do, another code when the look itself went wrong.
look() {
  local state workers
  state="$(pod_state)" || return 1
  case "$state" in
    ACTIVE) ;;
    "") count_restart "asking for a pod" && create && return 75 || return 1 ;;
    SUSPENDED | FAILED) note "$TPU_NAME is $state" && delete && return 75 || return 1 ;;
    *) return 75 ;; # waiting for resources, being made or being taken away
  esac
  if ! workers="$(QUIET=1 worker_status "$@" 2>&1)"; then
    note "$workers"
    return 1
  fi
  workers="$(sed -n 's/^tokenflow: //p' <<<"$workers" | sort -u)"
  case $'\n'"$workers"$'\n' in
    $'\n\n') return 1 ;;
    *running*) ;; # if one has ended, the others soon will
    *absent*) install && start "$@" || return 1 ;;
    $'\nexit 0\n') return 0 ;;
    *none* | *lost* | *"exit 12"[89]* | *"exit 1"[3-9][0-9]* | *"exit 2"[0-9][0-9]*)
      count_restart "starting the run, it was: ${workers//$'\n'/, }" && start "$@" || return 1
      ;;
    *) # Training failed; or the pod is being taken away, which its state tells with a delay.
      ((failed_before)) || { failed_before=1 && return 75; }
      note "the run failed with ${workers//$'\n'/, }: $0 tail"
      exit "${workers##*exit }"
      ;;
  esac
  failed_before=0
  return 75
}

count_restart() { # WHY
  ((restarts++ <= MAX_RESTARTS)) || fail "gave up after MAX_RESTARTS=$MAX_RESTARTS restarts"
  note "$@"
}

keep() {
  local code trouble=0
  if ((DRY_RUN)); then
    create && wait_for_pod && install && start "$@"
    echo "# every $POLL s, until the run is done:"
    wait_for_pod && worker_status "$@"
    echo "# when the pod was preempted, and then all from the beginning:"
    delete
    return
  fi
  while true; do
    code=0
    look "$@" || code=$?
    case "$code" in
      0) note "the run is done; the pod is still there: $0 delete" && return ;;
      75) trouble=0 ;;
      *) ((++trouble < 10)) || fail "gave up: ten looks in a row went wrong, the last with $code" ;;
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
  *) wrong_use "say what to do: create, wait, install, run, tail, status, stop, delete, keep" ;;
esac
need TPU_NAME "a name for the pod, such as tokenflow"
need ZONE "such as us-east5-a; gcloud compute tpus accelerator-types list --zone=ZONE"
need PROJECT "the Google Cloud project; gcloud config get project"
need_program gcloud "see https://cloud.google.com/sdk/docs/install"
need_number SLICES
if [[ $verb == create || $verb == keep ]]; then
  need TPU_TYPE "the accelerator type, such as v5p-128 or v6e-16"
  if [[ -n ${TPU_TYPE:-} ]]; then
    RUNTIME_VERSION="${RUNTIME_VERSION:-$(runtime_version)}"
    need RUNTIME_VERSION "unknown for TPU_TYPE=$TPU_TYPE; TPU7x and later: launch/gke_xpk.sh"
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
