#!/usr/bin/env bash
# Runs the training benchmark on one CUDA GPU: all sizes, methods and lengths, and the output layer. Takes hours and up
# to 34 GB of disk; options are benchmarks/gpu.py's (--help), e.g.
#   benchmarks/gpu.sh --sizes 8B --methods lora qlora --lengths 4096
# Without a GPU:
#   benchmarks/gpu.sh --device cpu --scale tiny
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if command -v nvidia-smi >/dev/null; then
  # Shows what else uses the GPU, and its clocks: figures measured next to another program, or at low power, are invalid.
  nvidia-smi --query-gpu=name,driver_version,memory.used,clocks.sm,power.limit --format=csv
fi
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
exec "${PYTHON:-python}" benchmarks/gpu.py "$@"
