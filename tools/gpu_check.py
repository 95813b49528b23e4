# SPDX-License-Identifier: MIT
"""Tests and benches on a machine with a GPU, each part in a process of its own with a time limit; see gpu_check.sh."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

LIMIT = 360  # seconds for all parts
GRACE = 10  # seconds at the end of a part's time in which pytest writes the results of what has run
# Unbuffered and in words, so that the output of a part that hangs in a kernel, and is killed, says where.
PYTEST = (sys.executable, "-u", "-m", "pytest", "-v", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60")
BENCH = (*PYTEST, "-s", "--continue-on-collection-errors", "--benchmark-only", "--benchmark-disable-gc")


RESULTS = {"junit": "xml", "json": "json", "results": "md"}  # placeholders in commands -> endings of their files


class Part(NamedTuple):
    """A part of the check.

    Attributes:
        name: Its name in the report, and that of its files.
        limit: Seconds after which it is killed; a little earlier, it is interrupted.
        command: Command line; {junit}, {json} and {results} are replaced by the files for its results.
    """

    name: str
    limit: float
    command: Sequence[str]


def bench(name: str, limit: float, *arguments: str) -> Part:
    return Part(name, limit, (*BENCH, *arguments, "--benchmark-json={json}", "--results={results}"))


ENGINE = "bench/bench_engine.py"
ON_GPU = [
    bench("labeling", 100, ENGINE, "-k", "labeling"),
    bench("extract", 50, ENGINE, "-k", "extract"),
    bench("index", 60, ENGINE, "-k", "index"),
    bench("command", 50, ENGINE, "-k", "command"),
    # Processes with as many threads as there are cores would wait for each other.
    Part("tests", 100, ("env", "OMP_NUM_THREADS=1", *PYTEST, "tests/kernels", "-n", "14", "--junitxml={junit}")),
    bench("operators", 90, "bench", "-k", "gpu and not extract"),
    Part("pipeline", 60, (*PYTEST, "tests/pipeline", "-k", "on_a_gpu or cuda", "--junitxml={junit}")),
]
ON_CPU = [
    bench("labeling", 120, ENGINE, "-k", "labeling and 0", "--quick"),
    Part("tests", 120, (*PYTEST, "tests/kernels/test_run_lengths.py", "-k", "pycocotools", "--junitxml={junit}")),
    bench("operators", 120, "bench/bench_run_lengths.py", "-k", "one-thread-blobs", "--quick"),
]


def _restore_sigint() -> None:
    """Lets a part be interrupted even if this process is a background job, whose shell makes it ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_part(part: Part, folder: Path, limit: float) -> dict:
    """Runs a part; its output is folder/NAME.txt. Returns its entry of the report."""
    files = {name: folder / f"{part.name}.{ext}" for name, ext in RESULTS.items()}
    for path in files.values():
        path.unlink(missing_ok=True)  # of an earlier run
    began = time.monotonic()
    command = [word.format(**files) for word in part.command]
    with (folder / f"{part.name}.txt").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_restore_sigint
        )
        grace = min(GRACE, limit / 3)
        try:
            outcome = {0: "passed"}.get(code := process.wait(limit - grace), f"exit code {code}")
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit:.0f} s"
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what it has started
            process.wait()
    report = {"outcome": outcome, "seconds": round(time.monotonic() - began, 1)}
    with contextlib.suppress(FileNotFoundError, xml.etree.ElementTree.ParseError):  # the latter if it was killed
        report |= _test_results(files["junit"])
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        measured = json.loads(files["json"].read_text())["benchmarks"]
        report["figures"] = [bench["extra_info"] for bench in measured if bench["extra_info"]]
        report["medians, ms"] = {bench["fullname"]: 1e3 * bench["stats"]["median"] for bench in measured}
    return report


def _test_results(path: Path) -> dict:
    suite = xml.etree.ElementTree.parse(path).find("testsuite")
    assert suite is not None
    bad = [
        case for case in suite.iter("testcase") if case.find("failure") is not None or case.find("error") is not None
    ]
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    return counts | {"failed": [f"{case.get('classname')}::{case.get('name')}" for case in bad]}


def about(cpu: bool) -> dict:
    """The device, versions and the commit."""
    import timm
    import torch

    commit = ""
    with contextlib.suppress(FileNotFoundError):  # no git
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    versions = {"torch": torch.__version__, "timm": timm.__version__, "python": sys.version.split()[0]}
    facts = {"device": "CPU", "cores": len(os.sched_getaffinity(0)), **versions, "commit": commit}
    if not cpu:
        import triton

        facts |= {"device": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
        facts |= {"cuda": torch.version.cuda, "triton": triton.__version__}
    return facts


def check(parts: Sequence[Part], folder: Path, report: dict, limit: float = LIMIT) -> bool:
    """Runs all parts, also after failures; writes folder/report.json after each. Returns whether all have passed.

    Args:
        parts: The parts, the most important first: those for which no time is left are not run.
        folder: Folder for the results.
        report: What the report begins with.
        limit: Seconds for all parts.
    """
    end = time.monotonic() + limit
    report["parts"] = {}
    for part in parts:
        left = end - time.monotonic()
        entry = run_part(part, folder, min(part.limit, left)) if left > 0 else {"outcome": "not run: no time left"}
        report["parts"][part.name] = entry
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        print(f"{part.name}: {entry['outcome']}, {entry.get('seconds', 0)} s", flush=True)
        for figures in entry.get("figures", ()):
            print(f"  {json.dumps(figures)}", flush=True)
    tables = [path.read_text() for part in parts if (path := folder / f"{part.name}.md").exists()]
    (folder / "tables.md").write_text("\n".join(tables))
    return all(entry["outcome"] == "passed" for entry in report["parts"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on the CPU, to check the check")
    parser.add_argument("results", nargs="?", type=Path, default=Path("bench/results"), help="folder for the results")
    given = parser.parse_args()
    os.chdir(Path(__file__).parent.parent)
    facts = about(given.cpu)
    folder = given.results / re.sub(r"\W+", "-", facts["device"])
    folder.mkdir(parents=True, exist_ok=True)
    passed = check(ON_CPU if given.cpu else ON_GPU, folder.absolute(), facts)
    print(f"results on {facts['device']}: {folder}/report.json, tables.md and the output of each part")
    sys.exit(not passed)


if __name__ == "__main__":
    main()
