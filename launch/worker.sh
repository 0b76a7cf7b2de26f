#!/usr/bin/env bash
# Runs on every worker of a TPU VM pod, in the copy of this checkout that tpu_vm.sh put there.
#   install      installs Python and this package for TPUs in an environment of its own
#   start ARGS   trains in the background; ~/tokenflow_run keeps the log, process id and exit code
#   status       prints "tokenflow: " and none, running, exit CODE, or lost (reboot or kill); given
#                ARGS, it ignores an ended run that had other arguments
#   idle         fails while a run is going
#   stop         sends SIGTERM, so that the run saves, and waits for its end
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

RUN="$HOME/tokenflow_run"
ENVIRONMENT="$HOME/tokenflow_env"

install() {
  idle
  mkdir -p "$RUN"
  rm -f "$RUN"/{pid,code,args}
  curl -LsSf https://astral.sh/uv/install.sh | sh
  local uv="$HOME/.local/bin/uv" # the images' own Python may be too old
  "$uv" venv --quiet --clear --python 3.12 "$ENVIRONMENT"
  "$uv" pip install --quiet --python "$ENVIRONMENT" --editable "${ROOT}[tpu]" "etils[epath-gcs]"
}

running() {
  # Checks the command line too: after a reboot the id may belong to another process.
  [[ -e $RUN/pid ]] && grep -qs worker.sh "/proc/$(cat "$RUN/pid")/cmdline"
}

status() {
  if running; then
    echo "tokenflow: running"
  elif (($#)) && [[ $(quoted "$@") != "$(cat "$RUN/args" 2>/dev/null)" ]]; then
    echo "tokenflow: none"
  elif [[ -s $RUN/code ]]; then
    echo "tokenflow: exit $(cat "$RUN/code")"
  elif [[ -e $RUN/pid ]]; then
    echo "tokenflow: lost"
  else
    echo "tokenflow: none"
  fi
}

idle() {
  ! running || fail "a run is going on here: stop it first"
}

start() {
  idle
  mkdir -p "$RUN"
  rm -f "$RUN/code"
  quoted "$@" >"$RUN/args"
  set -m # a process group of its own, which outlives the ssh session
  train "$@" >>"$RUN/log" 2>&1 </dev/null &
  echo "$!" >"$RUN/pid"
}

# train ARGS: runs to the end, in the background, and writes the exit code in one step.
train() {
  local code=0
  trap "" HUP # inherited by Python
  use_flags
  cd "$ROOT"
  TOKENFLOW_SIGTERM_CODE="$SIGTERM_CODE" "$ENVIRONMENT/bin/python" -m tokenflow_jax.main \
    --distributed "$@" || code=$?
  echo "$code" >"$RUN/code.new"
  mv "$RUN/code.new" "$RUN/code"
}

stop() {
  running || return 0
  pkill -TERM -P "$(cat "$RUN/pid")" || true # the run may just have ended
  for _ in {1..600}; do
    running || return 0
    sleep 1
  done
  fail "the run has not ended in ten minutes"
}

case "${1:-}" in
  install | start | status | idle | stop) "$@" ;;
  *) wrong_use "give one of: install, start, status, idle, stop" ;;
esac
