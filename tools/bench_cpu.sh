#!/bin/bash
# SPDX-License-Identifier: MIT
# The benches of the operators, of ViT features and of the labeling engine on this CPU, as bench/results/NAME.md. Takes
# half an hour on two idle cores. NAME should say which processor it is and how many cores it has, such as
# amd-epyc-zen4-2-cores.
#
#   tools/bench_cpu.sh NAME
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:?the name of this machine, as in tools/bench_cpu.sh amd-epyc-zen4-2-cores}
mkdir -p bench/results
operators=(attention_features bilateral_solver connected_components dense_crf normalized_cut pamr random_walk resize
  run_lengths spectral_clusters vote_masks)
files=("${operators[@]/#/bench/bench_}")
pytest "${files[@]/%/.py}" bench/bench_backbones.py bench/bench_engine.py -k "not gpu and not command and not index" \
  --benchmark-only --benchmark-disable-gc -q --results "bench/results/$name.md"
