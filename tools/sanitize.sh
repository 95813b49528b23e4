#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Builds the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs the operators' tests with them:
#
#   tools/sanitize.sh [BUILD_FOLDER]         a part that changes from day to day, for CI
#   tools/sanitize.sh --all [BUILD_FOLDER]   all tests
#
# NMK_LEVEL=portable or avx2 selects the code of a lower instruction level. The first error ends the process.
set -euo pipefail
cd "$(dirname "$0")/.."
all=
if [ "${1-}" = --all ]; then all=yes && shift; fi
build=${1-build/sanitize}

cmake -S . -B "$build" -G Ninja -DNMK_SANITIZE=ON -DNMK_CUDA=OFF -DCMAKE_BUILD_TYPE=None \
  -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" >/dev/null
cmake --build "$build"

packages=$(python tools/overlay.py "$build/packages" "$build"/_native*.so)
export PYTHONPATH="$packages:tests/kernels" OMP_NUM_THREADS=2
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)"  # before torch loads libstdc++
export LD_PRELOAD
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
python -c "import namedmask_kernels as nk; assert nk.backends.native().__file__.startswith('$packages')"

files=()
for file in tests/kernels/test_*.py; do
  case $file in *triton* | *emulator*) ;; *) files+=("$file") ;; esac
done
# Not: references, kernels in the emulator, subprocesses, and torch.compile, whose compiler is not what is tested.
select='not reference and not cuda and not triton and not required and not compile and not opcheck and not level'
if [ -z "$all" ]; then
  share=$(($(date +%j | sed 's/^0*//') % 3))
  part=()
  for i in "${!files[@]}"; do if [ $((i % 3)) = "$share" ]; then part+=("${files[$i]}"); fi; done
  files=(tests/kernels/test_extreme_values.py "${part[@]}")
fi
python -m pytest -q -p no:cacheprovider --capture=sys -k "$select" "${files[@]}"
