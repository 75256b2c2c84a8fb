#!/bin/bash
# Trains on several machines under Slurm: sbatch examples/slurm.sh CONFIG [--key value ...], from the
# repository, on a file system that all of them share. Sent again, it goes on where it was.
#SBATCH --job-name=gigagpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@900
set -euo pipefail

# One torchrun a machine, and one process a GPU; SYSTEMS_PER_NODE=2 and the like is for CPUs.
per_node=${SYSTEMS_PER_NODE:-${SLURM_GPUS_ON_NODE:?this partition has no GPUs: set SYSTEMS_PER_NODE}}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
python=$PWD/.venv/bin/python
[ -x "$python" ] || python=python3

# Without the first, restarted processes meet addresses that are no longer true; the second is how
# long a step and its checkpoint may take between SIGTERM and SIGKILL, in seconds.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=900
export OMP_NUM_THREADS=$(((SLURM_CPUS_ON_NODE + per_node - 1) / per_node))

srun "$python" -m torch.distributed.run \
    --nnodes "$SLURM_NNODES" --nproc_per_node "$per_node" --max_restarts 3 \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$first:29500" \
    train.py "$@" --num_systems $((SLURM_NNODES * per_node)) --checkpoint_path latest
