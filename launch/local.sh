#!/usr/bin/env bash
# One run on N processes of this machine, by the deepspeed launcher; N GPUs where there are any:
#   launch/local.sh N --config configs/language_quickstart.yaml [--section.key value ...]
# They meet at a free port, unless MASTER_PORT names one.
set -euo pipefail
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment

ranks="${1:-}"
if ! [[ "$ranks" =~ ^[1-9][0-9]*$ ]]; then
    echo "launch/local.sh: the first argument '$ranks' must be the number of processes" >&2
    exit 2
fi
command=(deepspeed -q --no_local_rank --num_accelerators "$ranks"
    --master_port "${MASTER_PORT:-$(free_port)}" --module simvq_moe train "${@:2}")
echo "local: ${command[*]}" >&2
supervised "${command[@]}"
