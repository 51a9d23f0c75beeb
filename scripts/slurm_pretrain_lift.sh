#!/usr/bin/env bash
# LIFT pretraining on SLURM, any number of nodes: sbatch scripts/slurm_pretrain_lift.sh [--config FILE] [--key value ...]
# One task for each GPU. CLIP: RECIPE=configs/real/clip.yaml sbatch scripts/slurm_pretrain_lift.sh
#SBATCH --job-name=pretrain_lift
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
source scripts/slurm_common.sh
srun_and_requeue lift pretrain --config "${RECIPE:-configs/real/lift.yaml}" "$@"
