# SPDX-License-Identifier: MIT
"""The longer commands of `cli`, and the options that several of them have."""
