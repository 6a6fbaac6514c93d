#!/usr/bin/env bash
# One run over the machines of a hostfile ("host slots=GPUS", a line each), by the deepspeed launcher
# over ssh (pdsh):
#   HOSTFILE=hosts launch/multi_node.sh --config configs/language_quickstart.yaml [...]
# This folder, with its .venv, must lie at the same path on every machine. Where machines can't reach
# each other by ssh, start each by hand: NODES=2 NODE=0 MASTER=host0 GPUS=8 launch/multi_node.sh ...
# MASTER_PORT is a free one unless set; by hand 29500, for all machines must name the same.
set -euo pipefail
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment

if [[ -n "${NODE:-}" ]]; then
    port="${MASTER_PORT:-29500}"
    if [[ "$NODE" == 0 ]] && ! port_is_free "$port"; then
        echo "launch/multi_node.sh: port $port is taken: set MASTER_PORT, the same on all machines" >&2
        exit 2
    fi
    command=(torchrun --nnodes "${NODES:?number of machines}" --node-rank "$NODE"
        --nproc-per-node "${GPUS:?processes on each machine}"
        --master-addr "${MASTER:?host of machine 0}" --master-port "$port" -m simvq_moe train "$@")
else
    hostfile="${HOSTFILE:-hostfile}"
    if [[ ! -f "$hostfile" ]]; then
        echo "launch/multi_node.sh: no file '$hostfile': set HOSTFILE, lines 'host slots=GPUS'" >&2
        exit 2
    fi
    command=(deepspeed -q --no_local_rank --hostfile "$hostfile"
        --master_port "${MASTER_PORT:-$(free_port)}" --module simvq_moe train "$@")
fi
echo "multi_node: ${command[*]}" >&2
exec "${command[@]}"
