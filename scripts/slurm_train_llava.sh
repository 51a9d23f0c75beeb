#!/usr/bin/env bash
# One stage of LLaVA training on SLURM: RECIPE=configs/llava15_vicuna7b_stage2.yaml sbatch scripts/slurm_train_llava.sh
# [--key value ...]. One task for each GPU; nodes share the folders. Stage 1 comes first (sbatch --dependency=afterok:JOB).
#SBATCH --job-name=train_llava
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@900
#SBATCH --requeue
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
source scripts/slurm_common.sh
srun_and_requeue lmm train --config "${RECIPE:-configs/llava15_vicuna7b_stage1.yaml}" "$@"
