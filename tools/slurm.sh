#!/bin/bash
# Several machines of eight GPUs under SLURM; the arguments are train.py's:
#   sbatch --nodes 2 tools/slurm.sh --config 3.1b --mode main
# A month is more than a job may take: submit the line several times with --dependency singleton, and each goes on where
# the one before stopped. The output folder must be on a disk that all machines see.
#SBATCH --job-name=main-path
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --open-mode=append
# --signal: ten minutes before the end all ranks are sent SIGTERM, save and end

export OMP_NUM_THREADS=8
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # restarted ranks must not get the addresses of the dead ones
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=540   # seconds for the ranks to save; before torch 2.13 always 30

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 8 --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    train.py "$@"
