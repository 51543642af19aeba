#!/usr/bin/env bash
# One node's part of a training on several: torchrun, and Ray beside it where the config's data.ingest is ray and names
# no cluster.  slurm.sh, hosts.sh and kubernetes/ start it on each node; what follows its name goes to launch/train.py, or
# to another program: GR_PROGRAM=launch/doctor.py ... --cluster --config FILE looks at all nodes.
#   GR_NODES    how many nodes             GR_NODE     this one's number, from 0; all meet at the first
#   GR_MEETING  HOST:PORT of the first     GR_ADDRESS  this node, as the others reach it (its host name)
#   GR_JOB      one name for all           GR_RESTART  how often the job was started before (0): then it goes on
# These need not be said: GR_CHECKOUT, GR_PYTHON, GR_PROCESSES (of a node: its GPUs, or 1), GR_RESTARTS (of a job that
# loses a process, before its scheduler is asked), GR_GRACE (seconds to save in, when told to leave: 60), GR_RAY_PORT,
# GR_RAY_CPUS (of a node, for data: half of its cores).
set -euo pipefail
: "${GR_NODES:?}" "${GR_NODE:?}" "${GR_MEETING:?}" "${GR_JOB:?}"
: "${GR_ADDRESS:=$(hostname)}" "${GR_PROCESSES:=1}" "${GR_RESTARTS:=3}" "${GR_GRACE:=60}" "${GR_RAY_PORT:=6379}"
: "${GR_PROGRAM:=launch/train.py}"
: "${GR_CHECKOUT:=$(cd "$(dirname "$0")/../.." && pwd)}"
: "${GR_PYTHON:=$GR_CHECKOUT/.venv/bin/python}"
export GR_RESTART=${GR_RESTART:-0}
ulimit -n "$(ulimit -Hn)" || true # every process of every node keeps connections to the first one, and to all others
cd "$GR_CHECKOUT"

port=${GR_MEETING##*:}
case $port in '' | *[!0-9]*)
    echo "error: GR_MEETING is '$GR_MEETING': say HOST:PORT of the first node" >&2
    exit 2
    ;;
esac
if ! [ "$GR_NODE" -lt "$GR_NODES" ] 2> /dev/null; then
    echo "error: GR_NODE is '$GR_NODE' and GR_NODES '$GR_NODES': nodes count from 0, and each is less than their number" >&2
    exit 2
fi
if [ "$GR_NODE" = 0 ] && (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; then
    echo "error: port $port of $GR_ADDRESS, where all meet, is in use: choose another one (GR_PORT, or GR_MEETING)" >&2
    exit 2
fi
is_host=$([ "$GR_NODE" = 0 ] && echo true || echo false)
arguments=("$@")
asked='import sys, yaml; i = yaml.safe_load(sys.stdin)["data"]["ingest"]; print(i["name"], i.get("address"))'
ingest=
if [ "$GR_PROGRAM" = launch/train.py ]; then
    ingest=$({ "$GR_PYTHON" launch/train.py "$@" --print-config | "$GR_PYTHON" -c "$asked"; } 2>/dev/null || true)
fi
if [ "$ingest" = "ray None" ]; then
    if [ -z "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ]; then
        echo "error: data.ingest is ray, and its processes need a secret that all nodes have: set RAY_AUTH_TOKEN, or" \
            "RAY_AUTH_TOKEN_PATH to a file of it" >&2
        exit 2
    fi
    [ -n "${RAY_AUTH_TOKEN_PATH:-}" ] || unset RAY_AUTH_TOKEN_PATH
    export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
    address=$(getent ahostsv4 "$GR_ADDRESS" | awk 'NR == 1 { print $1 }')
    meeting=${GR_MEETING%:*}:$GR_RAY_PORT
    start=("$GR_PYTHON" -m ray.scripts.scripts start --block --disable-usage-stats --num-gpus 0
        --node-ip-address "${address:-$GR_ADDRESS}" --num-cpus "${GR_RAY_CPUS:-$((($(nproc) + 1) / 2))}")
    if [ "$GR_NODE" = 0 ]; then
        start+=(--head --port "$GR_RAY_PORT" --include-dashboard false)
    else
        start+=(--address "$meeting")
    fi
    setpriv --pdeathsig TERM "${start[@]}" > /dev/null & # it ends with what this process becomes below
    ray=$!
    arguments+=("data.ingest.address=$meeting")
    for _ in {1..60}; do # until this node is one of the cluster's
        "$GR_PYTHON" -m ray.scripts.scripts health-check --address "$meeting" > /dev/null 2>&1 && break
        kill -0 "$ray" || { echo "error: Ray did not start on $GR_ADDRESS: try ray start by hand" >&2; exit 1; }
        sleep 1
    done
fi

# Whoever is left of the job's turn before meets nobody of this one, by the number of restarts in the meeting's name.
# Told to leave, all processes finish their step and save; those that haven't by then are killed.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$GR_GRACE
exec "$GR_PYTHON" -m torch.distributed.run --nnodes "$GR_NODES" --nproc-per-node "$GR_PROCESSES" \
    --max-restarts "$GR_RESTARTS" --rdzv-backend c10d --rdzv-endpoint "$GR_MEETING" --rdzv-conf "is_host=$is_host" \
    --rdzv-id "$GR_JOB-$GR_RESTART" --local-addr "$GR_ADDRESS" "$GR_PROGRAM" "${arguments[@]}"
