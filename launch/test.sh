#!/usr/bin/env bash
# Every check that CI runs: lint, format, types, tests, lowest versions. Arguments go to pytest: `launch/test.sh -m slow`
# runs the tests that take minutes, the quickstart in a fresh clone among them.
set -euo pipefail
# shellcheck source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment test

# tests start several processes of their own, which would fight over the cores
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
unset PYTHONDONTWRITEBYTECODE # compiled once, not in each of hundreds of processes
ruff check .
ruff format --check .
pyright & # one core's work, beside that of the tests
types=$!
trap 'kill "$types" 2> /dev/null || true' EXIT
# neighbours share what their file has prepared: each worker takes its part, then of what others have left; a third one
# works while the others wait for processes that they have started
pytest -n 3 --dist worksteal -m "not slow" "$@"
wait "$types"
# the GPU's search, in Triton's interpreter
TRITON_INTERPRET=1 pytest tests/core/search/test_nearest.py tests/core/search/test_*_triton.py
python -m tests.lowest_versions .venv/lowest
echo "test: all checks passed" >&2
