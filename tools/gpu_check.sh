#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Builds with the CUDA kernels, tests and benches every operator on a machine with a GPU, and tests backbones and
# segmenters there, in one go and offline:
#
#     tools/gpu_check.sh [RESULTS]        RESULTS is bench/results unless given
#
# Writes RESULTS/DEVICE.json (the device, versions, what the tests said) and RESULTS/DEVICE-bench.json (pytest-benchmark's
# own format). Needs what `pip install ".[bench]"` brings, and nvcc; WHEELS=FOLDER installs wheels from there first.
# Exits with 1 if anything failed, after trying everything.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-bench/results}
mkdir -p "$results"
failed=0
step() { printf '\n== %s\n' "$*"; }

step "build"
if [ -n "${WHEELS:-}" ]; then
  python -m pip install -q --no-index --no-deps "$WHEELS"/*.whl
fi
python -m pip install -q --no-build-isolation --no-deps -e . --config-settings=cmake.define.NMK_CUDA=ON
device=$(python -c 'import torch; print(torch.cuda.get_device_name())')
file=$results/$(tr -cs '[:alnum:]\n' '-' <<<"$device")
python -c 'from namedmask_kernels import backends; assert backends.native().has_cuda()'

step "Triton kernels compiled ahead of time"
python tools/compile_triton.py || failed=1

step "tests on $device"
python -m pytest -q tests/kernels tests/pipeline/test_{attention,backbones,predict,segmenter_training}.py \
  --junitxml="$file-tests.xml" || failed=1

step "benches on $device"
python -m pytest -q bench --benchmark-only --benchmark-disable-gc --benchmark-json="$file-bench.json" || failed=1

step "report"
python - "$file" <<'PYTHON'
import json
import pathlib
import subprocess
import sys
import xml.etree.ElementTree

import torch
import triton

file = sys.argv[1]
junit = pathlib.Path(f"{file}-tests.xml")
suite = xml.etree.ElementTree.parse(junit).find("testsuite")
bad = [f"{case.get('classname')}::{case.get('name')}" for case in suite.iter("testcase")
       if case.find("failure") is not None or case.find("error") is not None]
report = {
    "device": torch.cuda.get_device_name(),
    "capability": torch.cuda.get_device_capability(),
    "torch": torch.__version__,
    "triton": triton.__version__,
    "cuda": torch.version.cuda,
    "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
    "tests": {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")},
    "failed": bad,
}
pathlib.Path(f"{file}.json").write_text(json.dumps(report, indent=1) + "\n")
junit.unlink()
print(json.dumps(report, indent=1))
PYTHON
exit "$failed"
