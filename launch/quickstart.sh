#!/usr/bin/env bash
# From nothing to the comparison of README.md: installs into .venv, then trains SimVQ against VQ and
# a shared map against plain MoE, all by the deepspeed launcher on 2 processes, and reports. On a
# machine with one GPU every run is one process.
# Needs python3 (3.10 or newer), git and a compiler. About 17 minutes on 2 quiet CPU cores.
# Run again it skips what is finished and resumes what is not.
set -euo pipefail
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment

ranks=2 # a process a GPU, where there are any
if [[ "${DS_ACCELERATOR:-}" != cpu ]]; then
    gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
    ((gpus != 1)) || ranks=1
fi
simvq-moe sweep --config configs/sweeps/quickstart.yaml --ranks "$ranks" --launcher
echo "quickstart: done. Open runs/quickstart/report/report.html, or watch the curves: launch/dashboard.sh" >&2
