#!/usr/bin/env bash
# A training on the hosts of a file, started over ssh from one of them or from anywhere:
#   bash launch/cluster/hosts.sh HOSTS --config configs/ml-1m/hstu.yaml run.dir=/shared/runs/NAME
# HOSTS: a file with a host's name or address a line, as the other hosts reach it; what follows a # is a comment.  The
# first is the one where all meet.  What follows goes to launch/train.py.  The checkout, the environment, data.path and
# run.dir have the same paths everywhere, and ssh asks for no password.  Variables that begin with GLOO_, NCCL_,
# TORCH_NCCL_ or OMP_ go along; others, such as a store's credentials, are set on the hosts.  Ctrl-C ends all of them: they
# save first.
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
: "${GR_PROGRAM:=launch/train.py}"
: "${GR_SSH:=ssh -tt -o BatchMode=yes}"
: "${RAY_AUTH_TOKEN_PATH:=}"  # where data.ingest is ray: a file with a secret, that all hosts have and nobody else reads

mapfile -t hosts < <(sed -e 's/[[:space:]]*\(#.*\)\{0,1\}$//' -e 's/^[[:space:]]*//' -e '/^$/d' "$hosts_file")
for number in "${!hosts[@]}"; do
    case ${hosts[$number]} in
        *[[:space:]]*)
            echo "error: '$hosts_file' has the line '${hosts[$number]}': write a host a line, and GR_PROCESSES=N for" \
                "N processes on each" >&2
            exit 2
            ;;
    esac
    for other in "${hosts[@]:0:$number}"; do
        [ "$other" != "${hosts[$number]}" ] || {
            echo "error: '$hosts_file' names $other twice: write it once, and GR_PROCESSES=N for N processes on each" >&2
            exit 2
        }
    done
done
[ "${#hosts[@]}" -gt 0 ] || { echo "error: '$hosts_file' names no host: write one a line" >&2; exit 2; }
job="gr-$(date +%s)-$$"
arguments=$(printf '%q ' "$@")

along=() # ssh takes none of this side's variables with it
for name in "${!GLOO_@}" "${!NCCL_@}" "${!TORCH_NCCL_@}" "${!OMP_@}"; do along+=("$name=${!name}"); done

running=() readers=()
for number in "${!hosts[@]}"; do
    host=${hosts[$number]}
    settings=(GR_NODES="${#hosts[@]}" GR_NODE="$number" GR_MEETING="${hosts[0]}:$GR_PORT" GR_ADDRESS="$host" GR_JOB="$job"
        GR_CHECKOUT="$GR_CHECKOUT" GR_PYTHON="$GR_PYTHON" GR_PROCESSES="$GR_PROCESSES" GR_RESTARTS="$GR_RESTARTS"
        GR_PROGRAM="$GR_PROGRAM" RAY_AUTH_TOKEN_PATH="$RAY_AUTH_TOKEN_PATH" "${along[@]}")
    command="exec env $(printf '%q ' "${settings[@]}")bash $(printf %q "$GR_CHECKOUT/launch/cluster/node.sh") $arguments"
    exec {lines}> >(exec sed -u "s/^/[$host] /")
    readers+=($!)
    # shellcheck disable=SC2086  # GR_SSH is a command and its options
    $GR_SSH "$host" "$command" < /dev/null >&"$lines" 2>&1 &
    running+=($!)
    exec {lines}>&-
done
trap 'kill -TERM "${running[@]}" 2> /dev/null || true' INT TERM
status=0
while [ "${#running[@]}" -gt 0 ]; do
    ended='' code=0
    wait -n -p ended "${running[@]}" || code=$?
    [ -n "${ended:-}" ] || continue # a signal to this script
    for number in "${!running[@]}"; do [ "${running[$number]}" != "$ended" ] || unset "running[$number]"; done
    if [ "$code" != 0 ] && [ "$status" = 0 ]; then # the others would wait for it for minutes: they save and leave
        status=$code
        kill -TERM "${running[@]}" 2> /dev/null || true
    fi
done
wait "${readers[@]}" || true
exit "$status"
