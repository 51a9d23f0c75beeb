#!/usr/bin/env bash
# LIFT against every text side of the demo, with CLIP beside it: bash scripts/demo_text_encoders.sh [--key value ...]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run demo text_encoders --size "${DEMO_SIZE:-small}" "$@"
