#!/bin/sh
# Measures the GPU version in less than 8 minutes: benchmark/gpu.sh [folder for results]
# It needs requirements.txt and requirements-gpu.txt. PYTHON names another interpreter.
cd "$(dirname "$0")/.." && exec "${PYTHON:-python}" -m benchmark.gpu --out "${1:-benchmark/gpu}"
