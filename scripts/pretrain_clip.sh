#!/usr/bin/env bash
# Pretrains the CLIP baseline, like for like with LIFT: bash scripts/pretrain_clip.sh [CONFIG] [--key value ...]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
take_config configs/demo/clip.yaml "world" "$@"
train lift pretrain "${arguments[@]}"
