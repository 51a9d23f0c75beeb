#!/usr/bin/env bash
# MMBench subtask analysis of a LLaVA folder by lmms-eval: bash scripts/eval_mmbench.sh [FOLDER [DATA]] [--key value ...]
# DATA is an MMBench TSV or a folder of lift-eval data. It ends with the table of L1, L2 and L3 categories: circular and first-pass
# accuracy, choice by likelihood, lmms-eval's own score, answers that no rule could read.
# Without FOLDER it is the demo's LLaVA on LIFT; without DATA the demo's questions. Results go to runs/eval/ unless --out is given.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[[ " $* " == *" --help "* ]] && run eval lmm --help
folder=runs/demo/llava_lift/stage2 data=runs/demo/world/mmbench.tsv
if is_word "${1:-}"; then folder=$1; shift; else prepare_demo "tune LLaVA on LIFT"; fi
if is_word "${1:-}"; then data=$1; shift; elif [ ! -f "$data" ]; then prepare_demo world; fi
# named by the whole path: two models' folders are often called alike, and a run of another checkpoint is started anew
name=$(realpath -m --relative-base="$PWD" "$folder" | sed 's#^/##; s#^runs/##; s#/#_#g')_$(basename "${data%.tsv}")
run eval lmm "$folder" --tasks mmbench --data "$data" --out "runs/eval/$name" "$@"
