#!/usr/bin/env bash
# Benchmarks of an image-text encoder: bash scripts/eval_encoder.sh [ENCODER [CONFIG.yaml]] [--key value ...]
# Without ENCODER it is the demo's LIFT; without CONFIG.yaml and --tasks the demo's benchmarks. Results go to runs/eval/ unless --out is given.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[[ " $* " == *" --help "* ]] && run eval encoder --help
encoder=runs/demo/lift
if is_word "${1:-}"; then encoder=$1; shift; else prepare_demo "pretrain LIFT"; fi
if is_word "${1:-}"; then
    config=(--config "$1"); shift
elif [[ " $*" == *" --tasks"* || " $*" == *" --config"* ]]; then
    config=()
else
    [ -d runs/demo/world ] || prepare_demo world
    config=(--config configs/demo/benchmarks.yaml)
fi
run eval encoder "$encoder" "${config[@]}" "$@"
