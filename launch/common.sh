# shellcheck shell=bash
# Helpers that the other scripts source. Works with Bash 3.2 (macOS).

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
DRY_RUN=0
ARGS=()     # the arguments without --dry-run
PROBLEMS=() # missing or wrong settings, which check_needs reports together
QUIET=0     # not of the environment

# Exit code of a run that SIGTERM stopped after it saved: 128 + 15, as a shell reports it. The train
# command exits with 0 by default, like a finished run; with this code schedulers restart it.
# shellcheck disable=SC2034 # used by the scripts that source this file
SIGTERM_CODE=143

note() { echo "${0##*/}: $*" >&2; }

fail() {
  note "$@"
  exit 1
}

# Exit code 2, as in tokenflow_jax.main: wrong arguments or settings.
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

# quoted WORD...: prints the words as one line that any POSIX shell parses back unchanged.
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

# call COMMAND...: prints and runs a command (QUIET=1: only runs it; --dry-run: only prints it).
call() {
  if ((DRY_RUN)); then
    quoted "$@"
  else
    ((QUIET)) || note "+ $(quoted "$@")"
    "$@"
  fi
}

# Settings come from the environment, and Bash runs what it finds in a number that it calculates
# with: every one is checked before its first use.

# need NAME REMEDY: requires an environment variable that holds a name.
need() {
  if [[ -n "${!1:-}" ]]; then check_name "$1"; else PROBLEMS+=("$1 is not set: $2"); fi
}

# check_name NAME [MORE]: allows letters, digits, ".", "_", ":", "-" and MORE in a variable, if set.
check_name() {
  local pattern="^[A-Za-z0-9][A-Za-z0-9._:${2:-}-]*$"
  [[ -z "${!1:-}" || "${!1}" =~ $pattern ]] ||
    PROBLEMS+=("$1 is $(quoted "${!1}"): give a name of letters, digits and . _ : ${2:-}-")
}

# need_program NAME REMEDY: requires a program, except in a dry run.
need_program() {
  ((DRY_RUN)) || command -v "$1" >/dev/null || PROBLEMS+=("$1 is not installed: $2")
}

# need_number NAME [LEAST]: requires a whole number, LEAST (1) or more.
need_number() {
  [[ "${!1}" =~ ^(0|[1-9][0-9]{0,8})$ ]] && ((${!1} >= ${2:-1})) ||
    PROBLEMS+=("$1 is $(quoted "${!1}"): give a whole number, ${2:-1} or more")
}

# need_shared_workdir ARGUMENT...: requires a workdir that outlives the machines.
need_shared_workdir() {
  local argument previous="" workdir=""
  for argument in "$@"; do
    [[ $argument == --workdir=* ]] && workdir="${argument#--workdir=}"
    [[ $previous == --workdir ]] && workdir="$argument"
    previous="$argument"
  done
  case "$workdir" in
    gs://?* | /?*) ;; # an absolute path: a file system mounted on all machines
    "") PROBLEMS+=("--workdir is missing: give --workdir=gs://BUCKET/RUN, which outlives the machines") ;;
    *) PROBLEMS+=("--workdir=$workdir is lost with its machine: give --workdir=gs://BUCKET/RUN") ;;
  esac
}

# flags_for TYPE: prints the flags of launch/flags for a TPU type such as v5p-128, or for gpu, in one
# line; none with TOKENFLOW_FLAGS=off.
flags_for() {
  local chip="${1%%-*}"
  [[ $chip == v5litepod ]] && chip=v5e
  [[ ${TOKENFLOW_FLAGS:-} != off && -f $ROOT/launch/flags/$chip ]] || return 0
  awk '/^--/ { printf "%s%s", gap, $0; gap = " " }' "$ROOT/launch/flags/$chip"
}

# use_flags [TYPE]: exports the flags for a chip, by default this machine's, in LIBTPU_INIT_ARGS or
# XLA_FLAGS, before the user's own, which win.
use_flags() {
  local variable=LIBTPU_INIT_ARGS chip="${1:-${TPU_TYPE:-}}" flags
  local metadata=http://metadata.google.internal/computeMetadata/v1/instance/attributes
  if [[ -n $chip ]]; then
    :
  elif [[ -e /dev/accel0 || -e /dev/vfio/0 ]]; then # a TPU VM
    chip="$(curl -sf -m 5 -H "Metadata-Flavor: Google" "$metadata/accelerator-type" || true)"
  elif command -v nvidia-smi >/dev/null; then
    chip=gpu
  fi
  [[ $chip != gpu ]] || variable=XLA_FLAGS
  flags="$(flags_for "$chip")"
  [[ -z $flags ]] || export "$variable=$flags${!variable:+ ${!variable}}"
}

# use_tcmalloc: preloads tcmalloc where it is installed. On virtual machines page faults are dear: it
# takes those of a quickstart step from 21,400 to 730.
use_tcmalloc() {
  local library
  [[ ${TOKENFLOW_TCMALLOC:-} != off && ${LD_PRELOAD:-} != *malloc* ]] || return 0
  library="$({ ldconfig -p || true; } 2>/dev/null |
    awk '/libtcmalloc(_minimal)?\.so/ { print $NF; exit }')"
  [[ -z $library ]] || export LD_PRELOAD="$library${LD_PRELOAD:+ $LD_PRELOAD}"
}

# check_needs: exits with code 2 after one line per problem, if there are any.
check_needs() {
  local problem
  ((${#PROBLEMS[@]})) || return 0
  for problem in "${PROBLEMS[@]}"; do note "$problem"; done
  exit 2
}

# make_scratch: sets SCRATCH to a new folder, which is removed at the end.
make_scratch() {
  SCRATCH="${TMPDIR:-/tmp}"
  SCRATCH="${SCRATCH%/}/tokenflow.XXXXXX"
  ((DRY_RUN)) && return
  SCRATCH="$(mktemp -d "$SCRATCH")"
  trap 'rm -rf "$SCRATCH"' EXIT
}

# pack FILE: writes the last commit of this checkout, without its tests, as a tar.gz.
pack() {
  ((DRY_RUN)) || git -C "$ROOT" diff --quiet HEAD || note "uncommitted changes are left out"
  call git -C "$ROOT" archive --format=tar.gz "--output=$1" HEAD -- . ":(exclude)tests"
}
