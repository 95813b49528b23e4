#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Tests the lower bounds in pyproject.toml: installs the lowest version that each requirement allows, those of the build
# included, and runs tests of the kernels and the pipeline with them. The bounds of the extras bench, docs, dev and xformers
# are not tested:
#
#     tools/lowest_versions.sh [PYTHON]        PYTHON is python3.10, the lowest supported version, unless given
#
# The environment is temporary and takes 6 GB of disk (in TMPDIR).
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
step() { printf '\n== %s\n' "$*"; }

step "the lowest versions"
"${1:-python3.10}" -m venv "$work/venv"
# shellcheck disable=SC1091
source "$work/venv/bin/activate"
grep -oE '"[A-Za-z0-9_-]+>=[0-9.]+' pyproject.toml | tr -d '"' | sed 's/>=/==/' | sort -u | tee "$work/lowest.txt"
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip install -q -c "$work/lowest.txt" scikit-build-core pybind11 cmake ninja
pip install -q -c "$work/lowest.txt" --no-build-isolation --config-settings=build-dir="$work/build" ".[test]"
pip check

step "tests, away from the sources"
cp -r pyproject.toml tests "$work"
cd "$work"
HF_HUB_OFFLINE=1 pytest -q tests/pipeline/test_{backbones,cli,entry,export,index,masks,report,run}.py \
  tests/kernels/test_{bilateral_solver,normalized_cut,ragged}.py
