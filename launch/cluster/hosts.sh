#!/usr/bin/env bash
# A training on the hosts of a file, started over ssh from one of them or from anywhere:
#   bash launch/cluster/hosts.sh HOSTS --config configs/ml-1m/hstu.yaml run.dir=/shared/runs/NAME
# HOSTS: a file with a host's name or address a line, as the other hosts reach it; lines that begin with # are none.  The
# first is the one where all meet.  What follows goes to launch/train.py.  The checkout, the environment, data.path and
# run.dir have the same paths everywhere, and ssh asks for no password.  Ctrl-C ends all of them: they save first.
set -euo pipefail

if [ $# -lt 2 ] || [ ! -r "$1" ]; then
    echo "usage: hosts.sh HOSTS ARGUMENTS OF train.py (HOSTS: a file with a host a line)" >&2
    exit 2
fi
hosts_file=$1
shift
: "${GR_CHECKOUT:=$(cd "$(dirname "$0")/../.." && pwd)}"
: "${GR_PYTHON:=$GR_CHECKOUT/.venv/bin/python}"
: "${GR_PROCESSES:=1}"  # of a host: its GPUs
: "${GR_PORT:=29500}"   # free on the first host
: "${GR_RESTARTS:=3}"
: "${GR_SSH:=ssh -tt -o BatchMode=yes}"

mapfile -t hosts < <(grep -v '^[[:space:]]*\(#\|$\)' "$hosts_file")
[ "${#hosts[@]}" -gt 0 ] || { echo "error: '$hosts_file' names no host: write one a line" >&2; exit 2; }
job="gr-$(date +%s)-$$"
arguments=$(printf '%q ' "$@")

running=()
for number in "${!hosts[@]}"; do
    host=${hosts[$number]}
    is_host=$([ "$number" = 0 ] && echo true || echo false)
    command="cd $(printf %q "$GR_CHECKOUT") && TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 exec $(printf %q "$GR_PYTHON") \
-m torch.distributed.run --nnodes ${#hosts[@]} --nproc-per-node $GR_PROCESSES --max-restarts $GR_RESTARTS \
--rdzv-backend c10d --rdzv-endpoint ${hosts[0]}:$GR_PORT --rdzv-conf is_host=$is_host --rdzv-id $job \
--local-addr $host launch/train.py $arguments"
    # shellcheck disable=SC2086  # GR_SSH is a command and its options
    $GR_SSH "$host" "$command" < /dev/null 2>&1 | sed -u "s/^/[$host] /" &
    running+=($!)
done
trap 'trap - INT TERM; kill -INT 0' INT TERM
status=0
for process in "${running[@]}"; do wait "$process" || status=$?; done
exit "$status"
