#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Installs nvcc 13.0 and what the CUDA kernels are compiled against, from PyPI and without root:
#
#     tools/install_nvcc.sh FOLDER
#     export PATH=FOLDER/nvidia/cu13/bin:$PATH CUDA_PATH=FOLDER/nvidia/cu13
#
# PYTHON names the interpreter whose pip is used (python3). The five versions belong together.
set -euo pipefail
folder=$1
"${PYTHON:-python3}" -m pip install -q --no-deps --target "$folder" nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 \
  nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85
# The names under which nvcc and CMake look for them.
ln -sfn lib "$folder/nvidia/cu13/lib64"
ln -sf libcudart.so.13 "$folder/nvidia/cu13/lib/libcudart.so"
