# SPDX-License-Identifier: MIT
"""The Triton implementations. `ahead_of_time()` of a module lists its kernels for tools/compile_triton.py."""
