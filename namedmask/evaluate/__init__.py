# SPDX-License-Identifier: MIT
"""How good label maps are: `metrics` counts, `folders` finds the pairs and reads them."""
