# What the entry points share; sourced by them, not run. Sets up .venv first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh

is_word() { [ -n "$1" ] && [[ $1 != --* ]]; }

# prepare_demo STAGE: makes what the demo's own recipes need, up to that stage; what is finished is reused.
prepare_demo() { .venv/bin/python -m demo run --size "${DEMO_SIZE:-small}" --until "$1"; }

# take_config DEFAULT STAGE ARGUMENTS...: sets $config and $rest; with the default, the demo is first made up to STAGE.
take_config() {
    config=$1
    local stage=$2
    shift 2
    if is_word "${1:-}"; then config=$1; shift; elif [[ " $* " != *" --help "* ]]; then prepare_demo "$stage"; fi
    rest=("$@")
}

# launch PACKAGE ARGUMENTS...: under the launcher in $LAUNCH when there is one (torchrun, accelerate launch, deepspeed).
launch() {
    PATH="$PWD/.venv/bin:$PATH"
    # shellcheck disable=SC2086
    if [ -n "${LAUNCH:-}" ]; then exec $LAUNCH --module "$@"; else exec .venv/bin/python -m "$@"; fi
}
