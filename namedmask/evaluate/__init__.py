# SPDX-License-Identifier: MIT
"""Evaluation of label maps: `metrics` computes the metrics, `folders` pairs and reads the files."""
