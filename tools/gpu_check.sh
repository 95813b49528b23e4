#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Tests and benches on a machine with a GPU, in one go and offline, in at most 6 minutes after the build:
#
#     tools/gpu_check.sh [--cpu] [RESULTS]        RESULTS is bench/results unless given
#
# Runs the engine's benches, the tests and the benches of the kernels, each in a process of its own with a time limit, and
# goes on after a failure. RESULTS/DEVICE gets report.json (device, versions, outcomes, figures), tables.md and the output
# of each part. Needs what `pip install ".[bench]"` brings, and nvcc unless kernels with CUDA are installed;
# WHEELS=FOLDER installs wheels from there first. --cpu runs tiny sizes on the CPU, to check this script.
# Exits with 1 if anything failed.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -n "${WHEELS:-}" ]; then
  python3 -m pip install -q --no-index --no-deps "$WHEELS"/*.whl
fi
if [ "${1:-}" != --cpu ] && ! python3 -c 'from namedmask_kernels import backends; assert backends.native().has_cuda()'; then
  python3 -m pip install -q --no-build-isolation --no-deps -e . --config-settings=cmake.define.NMK_CUDA=ON
fi
exec python3 tools/gpu_check.py "$@"
