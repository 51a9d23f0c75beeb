#!/usr/bin/env bash
# Sets up if needed and runs the tests: bash scripts/test.sh [pytest arguments]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
run pytest "$@"
