# What the entry points share; sourced by them, not run. Sets up .venv first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh

is_word() { [ -n "$1" ] && [[ $1 != --* ]]; }

# prepare_demo STAGE: makes what the demo's own recipes need, up to that stage; what is finished is reused.
prepare_demo() { .venv/bin/python -m demo run --until "$1"; }

# take_config DEFAULT STAGE ARGUMENTS...: sets $arguments; with the default recipe, the demo is first made up to STAGE.
take_config() {
    local default=$1 stage=$2
    shift 2
    if is_word "${1:-}"; then
        arguments=(--config "$@")
    elif [[ " $*" == *" --config"* || " $* " == *" --help "* ]]; then
        arguments=("$@")
    else
        prepare_demo "$stage"
        arguments=(--config "$default" "$@")
    fi
}

run() { exec .venv/bin/python -m "$@"; }

# train PACKAGE ARGUMENTS...: as `run`, or under the launcher in $LAUNCH (torchrun, accelerate launch, deepspeed).
train() {
    export PATH="$PWD/.venv/bin:$PATH"
    # shellcheck disable=SC2086
    if [ -n "${LAUNCH:-}" ]; then exec $LAUNCH --module "$@"; else run "$@"; fi
}
