# SPDX-License-Identifier: MIT
"""Prints the table of docs/sizing.md from the figures of `namedmask estimate --json FIGURES.json`.

python tools/sizing.py FIGURES.json [CORES]

CORES is the number of cores of the measured machine, 2 by default.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

CORES = 16  # of the computed column
# Rates of one H100, units per second, with what they were measured of; see docs/performance.md.
H100 = {
    "index": (98, "float32"),
    "pseudolabel": (21, "short side 512, an earlier engine"),
    "experts training": (158, "float32, steps without decoding"),
    "train": (158, "float32, steps without decoding"),
}


def hours(seconds: float) -> str:
    """A time in hours with two digits."""
    value = seconds / 3600
    return f"{value:,.0f} h" if value >= 10 else f"{value:.1f} h" if value >= 1 else f"{value:.2f} h"


def main() -> None:
    figures = json.loads(Path(sys.argv[1]).read_text())
    cores = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    print(f"| Work | {cores} cores, measured | {CORES} cores, computed | One H100 |")
    print("|---|---|---|---|")
    sums = [0.0, 0.0]
    for row in figures["rows"]:
        name = f"{row['stage']} {row['part']}".strip()
        rate, context = H100.get(name, (None, ""))
        gpu = f"{hours(row['count'] / rate)} at {rate} {row['unit']}/s ({context})" if rate else "not measured"
        sums = [sums[0] + row["seconds"], sums[1] + (row["count"] / rate if rate else 0)]
        own = f"{hours(row['seconds'])} at {row['rate']:.3g} {row['unit']}/s"
        print(f"| {name}, {row['count']:,} {row['unit']} | {own} | {hours(row['seconds'] * cores / CORES)} | {gpu} |")
    print(f"| Sum | {hours(sums[0])} | {hours(sums[0] * cores / CORES)} | {hours(sums[1])}, without what is missing |")
    for title, key, digits in (("Disk", "disk", 2), ("Peak memory", "memory", 1)):
        parts = [f"{row['stage']} {row['part']}".strip() + f" {row[key] / 1e9:.{digits}f}" for row in figures["rows"]]
        total = f"; {sum(row[key] for row in figures['rows']) / 1e9:.1f} in all" if key == "disk" else ""
        print(f"\n{title} in GB: {', '.join(parts)}{total}.")


if __name__ == "__main__":
    main()
