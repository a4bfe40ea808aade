#!/bin/bash
# Trains under Slurm: sbatch slurm.sh --max_epochs 90. Flags of main.py stand behind, those of sbatch before slurm.sh.
# One run for each of several seeds: sbatch --array=0-4 slurm.sh
#SBATCH --job-name=train
#SBATCH --nodes=1                # machines
#SBATCH --ntasks-per-node=2      # processes on each: one for each of its GPUs
#SBATCH --gpus-per-node=2        # every process sees them all, and takes the one of its number; no GPUs: no such line
#SBATCH --cpus-per-task=4        # for one process and its --num_workers
#SBATCH --time=04:00:00          # when it is over, the job is ended ...
#SBATCH --signal=USR1@120        # ... but 120 seconds before, main.py is told: it saves, and queues the job again
#SBATCH --requeue                # which is allowed, as it is after preemption and when a node fails
#SBATCH --output=slurm-%j.out    # what is printed, %j being the job's number
#SBATCH --open-mode=append       # all starts of a job into one file

set -eu
# The environment that `make train` has set up, if there is one; otherwise that of the shell that ran sbatch.
export PATH="$PWD/.venv/bin:$PATH"

# How processes find each other: at the first machine, by a port that hardly any other job has.
hosts=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
export MASTER_ADDR=${hosts[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}

# srun starts every process itself, so that signals reach them all, and one that fails ends them all. `auto` goes on
# with this job's run when it is queued again.
code=0
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
  exec python main.py --ckpt_path auto ${SLURM_ARRAY_TASK_ID:+--seed $SLURM_ARRAY_TASK_ID} "$@"' main.py "$@" || code=$?

# While it trains, main.py queues the job again itself. Outside of training USR1 ends it (128 + 10), and a job that ends
# in the grace time of its preemption would stay ended.
if [ "$code" -eq 138 ] || { [ "$code" -ne 0 ] && scontrol show job "$SLURM_JOB_ID" | grep -q "PreemptTime=[0-9]"; }; then
  scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
