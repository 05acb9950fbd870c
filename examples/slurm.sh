#!/bin/bash
# One run on several machines of a SLURM cluster. Edit the lines marked "yours", then: sbatch slurm.sh
#SBATCH --job-name=ultrathink
#SBATCH --nodes=2                  # yours
#SBATCH --ntasks-per-node=1        # one launcher a machine; it starts a process for each GPU
#SBATCH --gpus-per-node=8          # yours
#SBATCH --cpus-per-task=64         # yours
#SBATCH --time=24:00:00            # yours
#SBATCH --output=%x-%j.log
#SBATCH --signal=TERM@300          # five minutes before the time is up: save and stop
#SBATCH --requeue                  # and go on when the machines are there again

set -euo pipefail

CONFIG=my.yaml                     # yours
RUN=runs/my                        # yours: run.dir/run.name of the configuration, on a shared disk
GPUS=${SLURM_GPUS_ON_NODE:-8}

# The first machine of the job is where all meet.
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# A run that has a checkpoint goes on from it.
if [ -e "$RUN/checkpoints/last" ]; then
    WHAT=(--resume "$RUN")
else
    WHAT=("$CONFIG")
fi

srun ultrathink launch \
    --nnodes "$SLURM_NNODES" --nproc "$GPUS" \
    --rdzv-endpoint "$HEAD:29400" --rdzv-id "$SLURM_JOB_ID" \
    "${WHAT[@]}"
