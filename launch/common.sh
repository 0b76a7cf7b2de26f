# shellcheck shell=bash
# Helpers of the scripts in this folder: sourced, not run. Bash 3.2 (macOS) is enough.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
DRY_RUN=0
ARGS=()     # the arguments without --dry-run, wherever it stood
PROBLEMS=() # what is missing; check_needs reports all of it at once

# Of the train command, when SIGTERM ended it and all was saved: 128 + 15, as the shell counts.
# Without this variable such a run ends with 0, and nobody could tell it from one that is done.
# shellcheck disable=SC2034 # for the scripts that source this
SIGTERM_CODE=143

note() { echo "${0##*/}: $*" >&2; }

fail() {
  note "$@"
  exit 1
}

# Like tokenflow_jax.main: what was asked for cannot be right.
wrong_use() {
  note "$@"
  exit 2
}

# parse ARGUMENT...: sets ARGS and DRY_RUN.
parse() {
  local argument
  for argument in "$@"; do
    if [[ $argument == --dry-run ]]; then DRY_RUN=1; else ARGS+=("$argument"); fi
  done
}

# quoted WORD...: prints the words as one line that any POSIX shell reads back unchanged.
quoted() {
  local word line="" quote="'" escaped="'\\''"
  for word in "$@"; do
    case "$word" in
      "" | *[!A-Za-z0-9_@%+=:,./-]*) word="'${word//$quote/$escaped}'" ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# call COMMAND...: runs it and says so, unless QUIET=1; under --dry-run only prints it.
call() {
  if ((DRY_RUN)); then
    quoted "$@"
  else
    ((${QUIET:-0})) || note "+ $(quoted "$@")"
    "$@"
  fi
}

# need NAME REMEDY: the environment variable must be set.
need() {
  [[ -n "${!1:-}" ]] || PROBLEMS+=("$1 is not set: $2")
}

# need_program NAME REMEDY: the program must be installed; --dry-run does without.
need_program() {
  ((DRY_RUN)) || command -v "$1" >/dev/null || PROBLEMS+=("$1 is not installed: $2")
}

# need_number NAME: the variable must be a whole number above zero.
need_number() {
  [[ "${!1}" =~ ^[1-9][0-9]*$ ]] || PROBLEMS+=("$1 is ${!1}: give a whole number, 1 or more")
}

# need_shared_workdir ARGUMENT...: machines that come and go need a workdir that all of them see.
need_shared_workdir() {
  local argument previous="" workdir=""
  for argument in "$@"; do
    [[ $argument == --workdir=* ]] && workdir="${argument#--workdir=}"
    [[ $previous == --workdir ]] && workdir="$argument"
    previous="$argument"
  done
  case "$workdir" in
    gs://?* | /?*) ;; # a path from the root: a file system mounted on all machines
    "") PROBLEMS+=("--workdir is missing: give --workdir=gs://BUCKET/RUN, which survives the machines") ;;
    *) PROBLEMS+=("--workdir=$workdir is lost with its machine: give --workdir=gs://BUCKET/RUN") ;;
  esac
}

# check_needs: exits with code 2 and one line per problem, if there is any.
check_needs() {
  local problem
  ((${#PROBLEMS[@]})) || return 0
  for problem in "${PROBLEMS[@]}"; do note "$problem"; done
  exit 2
}

# pack FILE: writes the last commit of this checkout, without its tests, as a tar.gz.
pack() {
  ((DRY_RUN)) || git -C "$ROOT" diff --quiet HEAD || note "without the changes that are not committed"
  call git -C "$ROOT" archive --format=tar.gz "--output=$1" HEAD -- . ":(exclude)tests"
}
