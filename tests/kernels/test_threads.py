# SPDX-License-Identifier: MIT
"""The number of threads: cores that the process may use, and forked children."""

import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from operator_calls import CALLS, IMAGE, MASK, flat

import namedmask_kernels as nk
from namedmask_kernels import Ragged
from namedmask_kernels.threads import cgroup_folders, usable_cores

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
FORK = multiprocessing.get_context("fork")
MATRIX = torch.rand(300, 300, generator=torch.Generator().manual_seed(0))
PHOTO = MATRIX.expand(1, 3, 300, 300)
BATCHES = {nk.bilateral_solver, nk.connected_components, nk.dense_crf, nk.fill_holes, nk.largest_component}
BATCHES |= {nk.normalized_cut, nk.pamr, nk.random_walk, nk.spectral_clusters}

# What the pipeline calls between the operators.
TORCH = {
    "addition": lambda: MATRIX + MATRIX,
    "product": lambda: MATRIX @ MATRIX,
    "softmax": lambda: MATRIX.softmax(1),
    "sort": lambda: MATRIX.flatten().sort()[0],
    "convolution": lambda: F.conv2d(PHOTO, torch.ones(8, 3, 3, 3)),
    "resize": lambda: F.interpolate(PHOTO, scale_factor=2, mode="bicubic", antialias=True),
}


def expect_same_in_child(call):
    """Calls in this process on several threads, then in a forked child; fails if the child hangs or differs."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        here = flat(call())

        def compare():
            same = all(torch.allclose(a, b, atol=1e-6) for a, b in zip(flat(call()), here, strict=True))
            os._exit(0 if same else 1)  # without pytest's exit handlers

        child = FORK.Process(target=compare)
        child.start()
        child.join(20)
        hangs = child.is_alive()
        child.kill()
        child.join()
    finally:
        torch.set_num_threads(before)
    assert not hangs, "the child hangs"
    assert child.exitcode == 0


@pytest.mark.parametrize("op", CALLS, ids=lambda op: op.__name__)
def test_operators_in_a_forked_child(op):
    arguments = CALLS[op]
    if op in BATCHES:  # several images, for several threads
        arguments = [Ragged.pack([x] * 4) if isinstance(x, torch.Tensor) else x for x in arguments]
    elif op is nk.vote_masks:
        arguments = [arguments[0].repeat(1, 80, 80)]

    def call():
        result = op(*arguments)
        return tuple(part.rows if isinstance(part, Ragged) else part for part in flat(result))

    expect_same_in_child(call)


@pytest.mark.parametrize("name", TORCH)
def test_torch_in_a_forked_child(name):
    expect_same_in_child(TORCH[name])


def refine(seed: int) -> np.ndarray:
    return nk.bilateral_solver(MASK.numpy(), np.roll(IMAGE.numpy(), seed, 0))


def test_operators_in_a_pool_of_forked_processes():
    nk.fill_holes(Ragged.pack([MASK] * 4))
    with FORK.Pool(2) as pool:
        results = pool.map_async(refine, range(4)).get(timeout=60)
    assert all(np.array_equal(result, refine(seed)) for seed, result in enumerate(results))


def write(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"},
        {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "200000 100000\n"},
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/x\n1:name=systemd:/\n0::/\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
    ],
    ids=["v2, container", "v2, parent", "v1, container"],
)
def test_cpu_quota_limits_the_cores(tmp_path, monkeypatch, files):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    write(tmp_path, files)
    assert usable_cores(tmp_path) == 2


@pytest.mark.parametrize(
    ("affinity", "count", "quota", "cores"),
    [(8, 4, "20000 100000", 1), (8, 4, "200000 100000", 2), (8, 4, "200001 100000", 3), (8, 4, "900000 100000", 8),
     (None, 4, "max 100000", 4), (None, None, "max 100000", 1), (None, 4, "300000 100000", 3)],
)  # fmt: skip
def test_the_lowest_limit_counts(tmp_path, monkeypatch, affinity, count, quota, cores):
    if affinity is None:  # as on macOS
        monkeypatch.delattr(os, "sched_getaffinity")
    else:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)))
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": quota})
    assert usable_cores(tmp_path) == cores


def test_folders_of_cgroups(tmp_path):
    """Those of the controller and of version 2, each with its parents up to where they are mounted."""
    write(tmp_path, {"proc/self/cgroup": "7:cpu,cpuacct:/a/b\n3:memory:/a\n0::/c:d\n"})
    found = [folder.relative_to(tmp_path / "sys/fs/cgroup").as_posix() for folder in cgroup_folders("cpu", tmp_path)]
    assert found == ["cpu,cpuacct/a/b", "cpu,cpuacct/a", "cpu,cpuacct", "c:d", "."]
    assert not list(cgroup_folders("cpu", tmp_path / "none"))


@pytest.mark.parametrize("content", ["max 100000\n", "max\n", "", "0 0\n", "-1 100000\n", "garbage 1\n"])
def test_without_a_quota_the_affinity_counts(tmp_path, monkeypatch, content):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert usable_cores(tmp_path) == 8
    write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": content})
    assert usable_cores(tmp_path) == 8


def test_kernels_use_the_cores_that_the_process_may_use():
    code = """
import os, sys
from namedmask_kernels import backends, threads
import torch
torch.set_num_threads(7)
print(backends.native().thread_count())
backends._extension.cache_clear()
backends.usable_cores = lambda: 3
print(backends.native().thread_count())
"""
    for variables, counts in (({}, [min(7, usable_cores()), 3]), ({"OMP_NUM_THREADS": "5"}, [7, 7])):
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | variables
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert list(map(int, done.stdout.split())) == counts


@pytest.mark.parametrize("kind", ["torch.from_numpy", ""], ids=["tensors", "numpy"])
def test_kernels_use_torchs_number_of_threads_in_new_threads(kind):
    """OpenMP's number is that of the environment there until torch sets it."""
    code = f"""
import threading
import numpy as np
import torch
import namedmask_kernels as nk

extension = nk.backends.native()
torch.set_num_threads(7)

def call():
    nk.fill_holes({kind}(np.zeros((2, 3), np.bool_)))
    print(extension.thread_count(), torch.get_num_threads())

thread = threading.Thread(target=call)
thread.start()
thread.join()
"""
    environment = os.environ | {"OMP_NUM_THREADS": "5"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["7", "7"]
