#!/bin/bash
# SLURM, one node with 8 GPUs: sbatch configs/cluster/slurm-one-node.sh my-config.json
# At the time limit the run saves a checkpoint and the job goes back into the queue; it continues when it starts again.
#SBATCH --job-name=dpo
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# 120 seconds before the limit, to this script alone: `dpo` gets it once. A second signal would stop it without a checkpoint.
#SBATCH --signal=B:TERM@120
set -u

# In the background, as bash handles a signal only between two commands.
dpo train "$1" --resume --processes "$SLURM_GPUS_ON_NODE" &
run=$!
trap 'kill -TERM "$run"' TERM
wait "$run"
code=$?
if [ "$code" = 143 ]; then # the signal ended `wait`: wait for the run itself, which is saving
  wait "$run"
  code=$?
fi

# --requeue is for a node that fails and for preemption; after the time limit the job requeues itself.
[ "$code" != 143 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
