#!/usr/bin/env bash
# Pretrains a LIFT encoder: bash scripts/pretrain_lift.sh [CONFIG] [--key value ...]
# Without CONFIG it is the demo's, on the rendered world. Several GPUs: LAUNCH="accelerate launch --multi_gpu" bash scripts/...
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
take_config configs/demo/lift.yaml "embed captions" "$@"
train lift pretrain "${arguments[@]}"
