#!/usr/bin/env bash
# From nothing to the comparison of README.md: installs into .venv, then trains SimVQ against VQ and
# a shared map against plain MoE, each run by the deepspeed launcher on 2 processes, and reports.
# Needs python3 (3.10 or newer), git and a compiler. About 13 minutes on 2 CPU cores.
# Run again it skips what is finished and resumes what is not.
set -euo pipefail
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment

simvq-moe sweep --config configs/sweeps/quickstart.yaml --ranks 2
echo "quickstart: done. Open runs/quickstart/report/report.html, or watch the curves: launch/dashboard.sh" >&2
