#!/usr/bin/env bash
# The whole chain on the rendered demo world: bash scripts/demo.sh [--key value ...]; DEMO_SIZE=tiny|small|full.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run demo run --size "${DEMO_SIZE:-small}" "$@"
