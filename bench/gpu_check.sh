#!/bin/bash
# The kernels on a machine with a GPU, in at most 8 minutes: its tests, then accuracy and times, as a table and as JSON.
#
#   bench/gpu_check.sh [gpu_check.py's options]      PYTHON=... names the interpreter; python3 if there is no .venv
#
# Exit codes: 0 all is well; 1 a test failed, or a kernel is wrong; 3 there is nothing to run on, which is said.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
unset TRITON_INTERPRET
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

"$python" bench/gpu_check.py --can-run || exit $?
status=0
timeout 300 "$python" -m pytest -q tests/kernels/test_gpu.py || status=1
timeout 180 "$python" bench/gpu_check.py "$@" || status=1
exit $status
