#!/usr/bin/env bash
# The whole chain on the rendered demo world: bash scripts/demo.sh [--key value ...]; DEMO_SIZE=tiny|small|full.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec .venv/bin/python -m demo run --size "${DEMO_SIZE:-small}" "$@"
