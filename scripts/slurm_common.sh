# What the SLURM jobs share; sourced by them from the project's folder, not run.

# srun_and_requeue ROOM ARGUMENTS...: ROOM's command in one process for each task. A run that was preempted or is out of time
# saves a checkpoint and exits with status 75; the job then puts itself in the queue again, and goes on from there.
srun_and_requeue() {
    local nodes status=0
    nodes=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?is set by SLURM: start this script with sbatch}")
    export MASTER_ADDR=${nodes%%$'\n'*}
    export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
    export WORLD_SIZE=$SLURM_NTASKS OMP_NUM_THREADS=1
    # With one GPU bound to each task, every process sees its own as number 0.
    srun --kill-on-bad-exit=1 bash -c '
        export RANK=$SLURM_PROCID LOCAL_RANK=0
        exec .venv/bin/"$0" "$@"' "$@" || status=$?
    if [ "$status" -eq 75 ] || [ "$status" -eq 143 ]; then  # 143: the signal came before the first step, nothing is lost
        scontrol requeue "$SLURM_JOB_ID" || true  # the status stays that of the run
    fi
    exit "$status"
}
