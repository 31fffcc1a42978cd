#!/bin/bash
# SLURM, several nodes with 8 GPUs each: sbatch --nodes=4 configs/cluster/slurm-nodes.sh my-config.json
# Config, data and runs/ are on a file system that all nodes share. One task is one process of the training, with one GPU.
#SBATCH --job-name=dpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# 120 seconds before the limit, to each task: the run saves a checkpoint and exits with 143.
#SBATCH --signal=TERM@120
set -u

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on a node have two ports
export MASTER_ADDR MASTER_PORT

# `dpo` reads SLURM_PROCID, SLURM_NTASKS and SLURM_LOCALID. The first task that ends does not end the one that still saves.
srun --kill-on-bad-exit=0 dpo train "$1" --resume
code=$?

# --requeue is for a node that fails and for preemption; after the time limit the job requeues itself.
[ "$code" != 143 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
