#!/usr/bin/env bash
# Trains on this machine, on all its accelerators. The same command continues a stopped run.
#   launch/local.sh [--dry-run] --config=configs/tokenizer.py [--workdir=DIR] ...
# PYTHON: the interpreter (default: python). TOKENFLOW_FLAGS=off: without the flags of launch/flags.
# TOKENFLOW_TCMALLOC=off: without tcmalloc, a faster memory allocator, which is used where installed.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse "$@"

PYTHON="${PYTHON:-python}"
need_program "$PYTHON" "activate the environment with tokenflow_jax, or set PYTHON"
check_name TPU_TYPE
check_needs
use_flags
use_tcmalloc

train=("$PYTHON" -m tokenflow_jax.main ${ARGS[@]+"${ARGS[@]}"})
if ((DRY_RUN)); then call "${train[@]}"; else exec "${train[@]}"; fi # exec: signals reach Python
