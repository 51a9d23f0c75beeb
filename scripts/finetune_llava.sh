#!/usr/bin/env bash
# Builds LLaVA on an encoder and tunes it under DeepSpeed, both stages: bash scripts/finetune_llava.sh [CONFIG] [--key value ...]
# Without CONFIG it is the demo's, on its LIFT encoder. Several GPUs: LAUNCH="deepspeed --num_gpus 8" bash scripts/...
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
take_config configs/demo/llava.yaml "language model" "$@"
train lmm finetune "${arguments[@]}"
