# SPDX-License-Identifier: MIT
"""Options of all benches, and the page of results.

pytest bench --benchmark-only -s                                   tables on the terminal
pytest bench --benchmark-only --results bench/RESULTS.md           the same tables as a Markdown page
pytest bench --benchmark-only --quick                              small sizes, to check that all benches run
"""

from pathlib import Path

import pytest

import common


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="small sizes, to check that benches run")
    parser.addoption("--results", type=Path, help="write all tables to this Markdown file")


def pytest_configure(config):
    common.QUICK = config.getoption("--quick")


@pytest.fixture(scope="session")
def quick(request) -> bool:
    return request.config.getoption("--quick")


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_json(benchmarks):
    """Leaves out a bench that was interrupted: it has no times, and pytest-benchmark would fail."""
    benchmarks[:] = [one for one in benchmarks if one]


def pytest_sessionfinish(session, exitstatus):
    path = session.config.getoption("--results")
    ran = pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED
    if path is not None and exitstatus in ran:
        path.write_text(common.results_page())
