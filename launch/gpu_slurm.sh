#!/usr/bin/env bash
# Runs a job on NVIDIA GPUs under Slurm, one process a GPU; requeues itself until it is done.
#
#   sbatch --nodes=2 launch/gpu_slurm.sh --config=configs/default.py --workdir=/shared/xl2
#
#SBATCH --job-name=lit_jax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail

status=0
srun --kill-on-bad-exit=1 python -m lit_jax.main "$@" || status=$?
# 0: done. 1: bad input. Others (75: time limit, preemption, a node lost; 70: crashed) go on from the last checkpoint. But one
# task's 1 can hide behind the signal that ended the others: a job that ends within ten minutes is not requeued a third time.
if ((status > 1)); then
  if ((SECONDS < 600 && ${SLURM_RESTART_COUNT:-0} >= 2)); then
    echo "ended within ten minutes with status $status, after ${SLURM_RESTART_COUNT} restarts: not requeued" >&2
  else
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$status"
