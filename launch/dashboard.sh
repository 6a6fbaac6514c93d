#!/usr/bin/env bash
# TensorBoard over a folder of runs on 127.0.0.1: launch/dashboard.sh [RUNS_DIR] [--port P]
set -euo pipefail
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment

simvq-moe dashboard "$@"
