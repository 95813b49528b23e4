# SPDX-License-Identifier: MIT
"""Triton versions of the operators. Each module has `ahead_of_time()`: its kernels as tools/compile_triton.py builds
them."""
