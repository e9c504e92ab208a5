#!/bin/bash
# Kernels and collectives on a machine with GPUs, in at most 15 minutes: tests, then accuracy, bits and times, as tables
# and as JSON lines.
#
#   bench/gpu_check.sh [gpu_check.py's options]      PYTHON=... names the interpreter; python3 if there is no .venv
#
# One GPU: ranks are threads, and then processes, that share it. More: a rank a GPU, with NCCL beside it.
# Exit codes: 0 all is well; 1 a test failed, or a result is wrong; 3 there is nothing to run on, which is said.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
unset TRITON_INTERPRET PARACOMM_DEVICE
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1
status=3

kernels() {
  status=0
  timeout 300 "$python" -m pytest -q tests/kernels/test_gpu.py || status=1
  timeout 180 "$python" bench/gpu_check.py "$@" || status=1
}

ranks() { # ranks N SCRIPT OPTIONS...
  timeout 150 "$python" -m torch.distributed.run --standalone --nproc-per-node "$@" || status=1
}

collectives() {
  local gpus
  gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
  if [ "$status" = 3 ]; then status=0; fi
  if [ "$gpus" = 1 ]; then
    timeout 150 "$python" bench/gpu_collectives.py --threads 4 || status=1
    # Processes take turns on the GPU: of interest is that they map each other's memory.
    ranks 2 bench/gpu_collectives.py --quick --sizes 1M:1M --rounds 2 --out gpu-processes.jsonl
    ranks 2 bench/gpu_ddp.py
  else
    ranks "$gpus" bench/gpu_collectives.py
    ranks "$gpus" bench/gpu_ddp.py
  fi
}

if "$python" bench/gpu_check.py --can-run; then kernels "$@"; fi
if "$python" bench/gpu_collectives.py --can-run; then collectives; fi
exit $status
