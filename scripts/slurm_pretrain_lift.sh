#!/usr/bin/env bash
# LIFT pretraining on SLURM, any number of nodes: sbatch scripts/slurm_pretrain_lift.sh [--config FILE] [--key value ...]
# One task for each GPU. Preempted or out of time, the job saves a checkpoint, exits with status 75 and puts itself in the
# queue again; the same job then goes on. CLIP: RECIPE=configs/real/clip.yaml sbatch scripts/slurm_pretrain_lift.sh
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
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
recipe=${RECIPE:-configs/real/lift.yaml}
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${nodes%%$'\n'*}
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE=$SLURM_NTASKS OMP_NUM_THREADS=1
# With one GPU bound to each task, every process sees its own as number 0.
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=0
    exec .venv/bin/lift pretrain --config "$0" "$@"' "$recipe" "$@"
status=$?
if [ "$status" -eq 75 ] || [ "$status" -eq 143 ]; then  # 143: the signal came before the first step, nothing is lost
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
