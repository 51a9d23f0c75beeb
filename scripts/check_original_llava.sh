#!/usr/bin/env bash
# Does the original LLaVA code take what this toolkit writes? With tiny models, on a CPU: its training takes an encoder of
# `lift export` as --vision_tower and makes steps, its loader answers from checkpoints of `lmm export` as we do, and `lmm import`
# reads what its training wrote. The original needs packages of 2024, so it gets an environment of its own
# (ORIGINAL_LLAVA_ENV, .venv-original by default; about 6 GB and 5 minutes once, then the check takes about a minute).
# PYTHON names the Python for it (3.8 to 3.11); OURS a Python that has this toolkit, instead of .venv; WORK a folder that keeps
# the files of the check.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "error: $*" >&2; exit 2; }

environment=${ORIGINAL_LLAVA_ENV:-.venv-original}
packages=(
    torch==2.2.2 torchvision==0.17.2 transformers==4.37.2 tokenizers==0.15.1 "numpy<2" sentencepiece==0.1.99 accelerate==0.21.0
    "protobuf<5" einops==0.6.1 einops-exts==0.0.4 timm==0.6.13 requests "pillow<11" "setuptools<70" wheel
)
# Its training saves the projector through DeepSpeed's functions, also where DeepSpeed is not used; built from source.
after=("deepspeed==0.12.6" "pydantic<2.6")
original=llava-torch==1.2.2.post1
stamp=$environment/installed.txt

if [ "$(cat "$stamp" 2>/dev/null)" != "${packages[*]} ${after[*]} $original" ]; then
    python=""
    for candidate in "${PYTHON:-}" python3.11 python3.10 python3; do
        [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(not (3, 8) <= sys.version_info[:2] <= (3, 11))' 2>/dev/null \
            && { python=$candidate; break; }
    done
    [ -n "$python" ] || fail "a Python from 3.8 to 3.11 is needed, which torch 2.2.2 and sentencepiece 0.1.99 have wheels for; found $(python3 --version 2>&1 || true). Name one: PYTHON=/path/to/python3.11 bash $0"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python cannot make virtual environments. Install its venv module (Debian, Ubuntu: apt-get install python3-venv)."
    mkdir -p "$environment"
    free=$(df --output=avail -BG "$environment" | tail -1 | tr -dc 0-9)
    [ "$free" -ge "${NEEDED_GB:-10}" ] || fail "$environment: $free GB are free there, ${NEEDED_GB:-10} GB are needed. Make room, or name another place: ORIGINAL_LLAVA_ENV=DIR bash $0"
    echo "Setting up $environment for the original LLaVA (about 6 GB, some minutes) ..."
    [ -x "$environment/bin/python" ] || "$python" -m venv "$environment"
    install=("$environment/bin/python" -m pip install --quiet --disable-pip-version-check)
    # Without its dependencies: those it pins are of another transformers than LLaVA-1.5's own repository, and of servers.
    "${install[@]}" "${packages[@]}" && DS_BUILD_OPS=0 "${install[@]}" --no-build-isolation "${after[@]}" \
        && "${install[@]}" --no-deps "$original" \
        || fail "pip could not install the original's packages; its message is above. Mend the cause and run the same command again."
    echo "${packages[*]} ${after[*]} $original" >"$stamp"
fi
ours=${OURS:-.venv/bin/python}
[ -n "${OURS:-}" ] || bash scripts/setup.sh

if [ -n "${WORK:-}" ]; then
    work=$WORK
    mkdir -p "$work"
    [ -z "$(ls -A "$work")" ] || fail "$work: expected an empty folder for the check's files, found others. Name another: WORK=DIR."
else
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 CUDA_VISIBLE_DEVICES=""
export PYTHONPATH="$PWD" PYTHONWARNINGS=ignore TRANSFORMERS_VERBOSITY=error
theirs() { "$environment/bin/python" scripts/original_llava/theirs.py "$@" >>"$work/log.txt" 2>&1 || { tail -30 "$work/log.txt"; fail "the original failed: $*"; }; }
ours() { "$ours" "$@" >>"$work/log.txt" 2>&1 || { tail -30 "$work/log.txt"; fail "ours failed: $*"; }; }
check() { "$ours" scripts/original_llava/ours.py "$@" || fail "a check failed, see above; WORK=DIR keeps the files"; }

echo "== tiny models: a Llama and its tokenizer by the original's environment, an encoder by lift"
theirs llm README.md "$work/llm"
ours scripts/original_llava/ours.py data "$work"
ours -m lift pretrain --config "$work/pretrain.yaml"
ours -m lift export "$work/run" --out "$work/encoder"

echo "== the original's vision tower on our encoder"
theirs features "$work/encoder" "$work/images/0.png" "$work/features.json"
check features "$work/encoder" "$work/images/0.png" "$work/features.json"

echo "== the original's training, both stages, with our encoder as --vision_tower"
common=(
    --data_path "$work/conversations.json" --image_folder "$work/images" --vision_tower "$work/encoder" --image_aspect_ratio pad
    --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False
    --bf16 True --use_cpu True --per_device_train_batch_size 4 --max_steps 2 --learning_rate 1e-2 --logging_steps 1
    --save_strategy no --report_to none --model_max_length 512 --lazy_preprocess True --dataloader_num_workers 0
)
theirs train --model_name_or_path "$work/llm" --version plain --tune_mm_mlp_adapter True --output_dir "$work/llava-stage1" "${common[@]}"
theirs train --model_name_or_path "$work/llm" --version v1 --pretrain_mm_mlp_adapter "$work/llava-stage1/mm_projector.bin" \
    --output_dir "$work/llava-stage2" "${common[@]}"
check steps "$work/llava-stage1" "$work/llava-stage2"

echo "== its checkpoint through lmm import, and back through lmm export"
ours -m lmm import "$work/llava-stage2" --out "$work/imported"
ours -m lmm export "$work/imported" --format llava --out "$work/llava-exported"
echo "== a model of lmm build with another tokenizer, its projector from the original's stage 1, through lmm export"
ours scripts/original_llava/ours.py llm "$work/bytes"
ours -m lmm build --vision_tower "$work/encoder" --llm "$work/bytes" --out "$work/fresh" --chat_template vicuna_v1
ours -m lmm import "$work/llava-stage1" --out "$work/built" --model_base "$work/fresh"
ours -m lmm export "$work/built" --format llava --out "$work/llava-built"
for pair in "llava-stage2 imported" "llava-exported imported" "llava-built built"; do
    read -r checkpoint folder <<<"$pair"
    theirs answers "$work/$checkpoint" "$work/questions.json" "$work/$checkpoint.answers.json"
    check answers "$work/$folder" "$work/questions.json" "$work/$checkpoint.answers.json"
done
echo "all checks passed"
