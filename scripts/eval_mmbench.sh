#!/usr/bin/env bash
# MMBench subtask analysis of a LLaVA folder by lmms-eval: bash scripts/eval_mmbench.sh [FOLDER [MMBENCH_TSV]] [--key value ...]
# Without FOLDER it is the demo's LLaVA on LIFT; without MMBENCH_TSV the demo's questions. Results go to runs/eval/ unless --out is given.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[[ " $* " == *" --help "* ]] && run eval lmm --help
folder=runs/demo/llava_lift/stage2 questions=runs/demo/world/mmbench.tsv
if is_word "${1:-}"; then folder=$1; shift; else prepare_demo "tune LLaVA on LIFT"; fi
if is_word "${1:-}"; then questions=$1; shift; elif [ ! -f "$questions" ]; then prepare_demo world; fi
name=$(basename "$(dirname "$(realpath -m "$folder")")")_$(basename "$folder")_$(basename "${questions%.tsv}")
run eval lmm "$folder" --data "$questions" --out "runs/eval/$name" "$@"
