# SPDX-License-Identifier: MIT
"""The definitions of the operators in plain numpy and torch: short, readable, one image at a time. All other backends
are tested against them."""
