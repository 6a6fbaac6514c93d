#!/usr/bin/env bash
# One run on N processes of this machine, by the deepspeed launcher; N GPUs where there are any:
#   launch/local.sh N --config configs/language_quickstart.yaml [--section.key value ...]
# They meet at a free port, unless MASTER_PORT names one. Of the GPUs that CUDA_VISIBLE_DEVICES names they
# take the first N; without it those of the machine.
set -euo pipefail
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment

ranks="${1:-}"
if ! [[ "$ranks" =~ ^[1-9][0-9]*$ ]]; then
    echo "launch/local.sh: the first argument '$ranks' must be the number of processes" >&2
    exit 2
fi
devices=(--num_accelerators "$ranks")
if [[ -n "${CUDA_VISIBLE_DEVICES:-}" && "${DS_ACCELERATOR:-}" != cpu ]]; then
    if ! [[ "$CUDA_VISIBLE_DEVICES" =~ ^[0-9]+(,[0-9]+)*$ ]]; then
        echo "launch/local.sh: CUDA_VISIBLE_DEVICES $CUDA_VISIBLE_DEVICES: the deepspeed launcher knows GPUs" \
            "by number alone: give their numbers (nvidia-smi -L)" >&2
        exit 2
    fi
    IFS=, read -ra named <<< "$CUDA_VISIBLE_DEVICES"
    if ((${#named[@]} < ranks)); then
        echo "launch/local.sh: CUDA_VISIBLE_DEVICES $CUDA_VISIBLE_DEVICES names ${#named[@]} GPUs <" \
            "$ranks: name more, start fewer processes, or set DS_ACCELERATOR=cpu" >&2
        exit 2
    fi
    # told a number, the launcher would take the machine's first GPUs
    CUDA_VISIBLE_DEVICES="$(IFS=,; echo "${named[*]:0:ranks}")"
    export CUDA_VISIBLE_DEVICES
    devices=()
fi
command=(deepspeed -q --no_local_rank "${devices[@]}"
    --master_port "${MASTER_PORT:-$(free_port)}" --module simvq_moe train "${@:2}")
echo "local: ${command[*]}" >&2
supervised "${command[@]}"
