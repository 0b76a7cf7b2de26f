#!/usr/bin/env bash
# What tpu_vm.sh does on every worker, in the copy of this checkout there.
#   install      Python and this package for TPUs, in an environment of their own
#   start ARGS   trains in the background; log, process and exit code are kept in ~/tokenflow_run
#   status       one line, "tokenflow: " and: none, running, exit CODE, lost (reboot or kill)
#   stop         SIGTERM, so that the run saves; returns when it has ended
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

RUN="$HOME/tokenflow_run"
ENVIRONMENT="$HOME/tokenflow_env"

install() {
  mkdir -p "$RUN"
  curl -LsSf https://astral.sh/uv/install.sh | sh
  local uv="$HOME/.local/bin/uv" # the images' own Python may be too old
  "$uv" venv --quiet --clear --python 3.12 "$ENVIRONMENT"
  "$uv" pip install --quiet --python "$ENVIRONMENT" --editable "$ROOT[tpu]" "etils[epath-gcs]"
}

status() {
  local pid
  pid="$(cat "$RUN/pid" 2>/dev/null || true)"
  # The name as well: after a reboot the number may be another process.
  if [[ -n $pid ]] && grep -qs worker.sh "/proc/$pid/cmdline"; then
    echo "tokenflow: running"
  elif [[ -s $RUN/code ]]; then
    echo "tokenflow: exit $(cat "$RUN/code")"
  elif [[ -n $pid ]]; then
    echo "tokenflow: lost"
  else
    echo "tokenflow: none"
  fi
}

start() {
  [[ $(status) != "tokenflow: running" ]] || fail "a run is under way here: stop it first"
  mkdir -p "$RUN"
  rm -f "$RUN/code"
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
  [[ $(status) == "tokenflow: running" ]] || return 0
  pkill -TERM -P "$(cat "$RUN/pid")" || true # it may just have ended
  for ((seconds = 0; seconds < 600; seconds++)); do
    [[ $(status) == "tokenflow: running" ]] || return 0
    sleep 1
  done
  fail "the run has not ended in ten minutes"
}

case "${1:-}" in
  install | start | status | stop | supervise) "$@" ;;
  *) fail "say what to do: install, start, status or stop" ;;
esac
