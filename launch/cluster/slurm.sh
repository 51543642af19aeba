#!/usr/bin/env bash
# A training on several nodes under Slurm.  Fill in the names below, then:
#   sbatch launch/cluster/slurm.sh --config configs/ml-1m/hstu.yaml run.dir=/shared/runs/NAME model.table.name=torchrec
# What follows the script's name goes to launch/train.py.  run.dir and data.path must be on storage that all nodes share.
#
# The job is told two minutes before its time is up, saves, and is put back into the queue; it goes on with its own run when
# it starts again, as it does after a node was lost (docs/cluster.md).
#SBATCH --job-name=gr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=gr-%j.log
# On GPU nodes also, for 8 of them: #SBATCH --gpus-per-node=8
set -euo pipefail

: "${GR_CHECKOUT:=$SLURM_SUBMIT_DIR}"          # where this checkout lies, on all nodes
: "${GR_PYTHON:=$GR_CHECKOUT/.venv/bin/python}"
: "${GR_PROCESSES:=${SLURM_GPUS_ON_NODE:-1}}"  # of a node: its GPUs
: "${GR_PORT:=29500}"                          # free on the first node
: "${GR_RESTARTS:=3}"                          # of a job that loses a process, before Slurm is asked

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export GR_CHECKOUT GR_PYTHON GR_PROCESSES GR_RESTARTS
export GR_NODES=$SLURM_NNODES GR_MEETING="$head:$GR_PORT"
# gr knows its run by the job's id, when Slurm starts the job again
export GR_JOB="slurm-$SLURM_JOB_ID" GR_RESTART=${SLURM_RESTART_COUNT:-0}
# where data.ingest is ray: its processes answer to those alone who know this
export RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')}

again() { # the time is nearly up: all processes save and leave, then the job waits for its next turn
    echo "[slurm] the time is nearly up: saving"
    scancel --signal=TERM "$SLURM_JOB_ID.0" || true # not to srun, which would kill them at once
    wait "$step" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap again USR1

# shellcheck disable=SC2016  # the nodes expand it
srun --kill-on-bad-exit=1 bash -c '
    GR_NODE=$SLURM_NODEID exec bash "$GR_CHECKOUT/launch/cluster/node.sh" "$@"
' gr "$@" &
step=$!
wait "$step"
