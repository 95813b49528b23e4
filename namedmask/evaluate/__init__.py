# SPDX-License-Identifier: MIT
"""Evaluation of masks: metrics, folders of label maps, and public benchmarks as they lie on disk."""

from typing import Literal

BenchmarkName = Literal[
    "voc2012",
    "coco2017",
    "coca",
    "cityscapes-object",
    "imagenet-s50",
    "imagenet-s300",
    "imagenet-s919",
    "ecssd",
    "duts-te",
    "dut-omron",
]
