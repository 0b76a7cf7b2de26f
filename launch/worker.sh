#!/usr/bin/env bash
# What tpu_vm.sh does on every worker, in the copy of this checkout there.
#   install      Python and this package for TPUs, in an environment of their own
#   start ARGS   trains in the background; log, process and exit code are kept in ~/tokenflow_run
#   status       one line, "tokenflow: " and: none, running, exit CODE, lost (reboot or kill);
#                with ARGS, an earlier run with other arguments counts as none
#   idle         fails if a run is under way
#   stop         SIGTERM, so that the run saves; returns when it has ended
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
  # Its name as well: after a reboot the number may be another process.
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
  ! running || fail "a run is under way here: stop it first"
}

start() {
  idle
  mkdir -p "$RUN"
  rm -f "$RUN/code"
  quoted "$@" >"$RUN/args"
  setsid nohup bash "$ROOT/launch/worker.sh" supervise "$@" >>"$RUN/log" 2>&1 </dev/null &
  echo "$!" >"$RUN/pid"
}

supervise() {
  local code=0
  cd "$ROOT"
  TOKENFLOW_SIGTERM_CODE="$SIGTERM_CODE" "$ENVIRONMENT/bin/python" -m tokenflow_jax.main \
    --distributed "$@" || code=$?
  echo "$code" >"$RUN/code.new"
  mv "$RUN/code.new" "$RUN/code"
}

stop() {
  local seconds
  running || return 0
  pkill -TERM -P "$(cat "$RUN/pid")" || true # it may just have ended
  for ((seconds = 0; seconds < 600; seconds++)); do
    running || return 0
    sleep 1
  done
  fail "the run has not ended in ten minutes"
}

case "${1:-}" in
  install | start | status | idle | stop | supervise) "$@" ;;
  *) wrong_use "say what to do: install, start, status or stop" ;;
esac
