#!/usr/bin/env bash
# What only a GPU can show, by one command in about 8 minutes after the installation:
#   launch/gpu_check.sh [OUT]
# tests of kernels, precisions, resume and waits on the device, then ours beside peers, then memory
# beside the dry run. OUT (gpu_check) gets check.md, a table, and check.json, every number.
# DEVICE=cpu rehearses it on CPUs with small sizes: the times say nothing of a GPU.
set -euo pipefail
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
out="$(realpath -m "${1:-gpu_check}")"
environment test
export DEVICE="${DEVICE:-cuda}"
if [[ "$DEVICE" == cuda ]] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "launch/gpu_check.sh: torch sees no GPU here: DEVICE=cpu rehearses on CPUs" >&2
    exit 2
fi
if [[ -e "$out/check.json" ]]; then
    echo "launch/gpu_check.sh: $out/check.json exists: give another folder, or remove it" >&2
    exit 2
fi
mkdir -p "$out"
small=() shapes=() loops=()
if [[ "$DEVICE" == cpu ]]; then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
    small=(--codes 1024) shapes=(--experts 8 --tokens 512 --rounds 1)
    loops=(--config configs/language_quickstart.yaml --steps 2 --rounds 1)
fi

echo "gpu_check: tests" >&2
tests=(tests/device tests/core/search tests/moe/test_dispatch.py tests/moe/test_host_sync.py)
failed=0
pytest -m "not slow" --junit-xml "$out/tests.xml" "${tests[@]}" >&2 || failed=1
echo "gpu_check: quantizers, layers and loops beside peers" >&2
simvq-moe bench quantizer --device "$DEVICE" --json "$out/quantizer.json" "${small[@]}" > "$out/quantizer.md"
simvq-moe bench moe --device "$DEVICE" --json "$out/moe.json" "${shapes[@]}" > "$out/moe.md"
simvq-moe bench train --device "$DEVICE" --ranks 1 --json "$out/train.json" "${loops[@]}" > "$out/train.md"
echo "gpu_check: memory beside the dry run" >&2
python -m simvq_moe.benchmarks.gpu_check "$out"
echo "gpu_check: $out/check.md" >&2
exit "$failed"
