#!/bin/bash
# Several nodes under Slurm, one process for each GPU, data parallel:
#   sbatch --nodes 2 launch/slurm.sh recipes/mix.yaml base=/models/llava-v1.5-7b data.root=/data
# After a node was lost, run the same line with resume=true. It continues from the last checkpoint that every process had written.
# The run's folder (output=…) must be on a disk that all nodes share.
#SBATCH --job-name=lcl-adapter
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=8 HF_HUB_OFFLINE=1
srun torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m lcl_adapter train "$@"
