# SPDX-License-Identifier: MIT
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from namedmask import distributed
from namedmask.distributed import Worker
from namedmask.errors import UserError


@pytest.fixture
def workers():
    """Two workers with a common store, each with its own connection, as in two processes."""
    server = TCPStore("localhost", 0, 2, True, timedelta(seconds=30), wait_for_workers=False)
    client = TCPStore("localhost", server.port, 2, False, timedelta(seconds=30), wait_for_workers=False)
    return [Worker(0, 2, 0, server), Worker(1, 2, 1, client)]


def test_shards_are_claimed_once_and_do_not_wait_for_a_slow_worker(workers):
    slow, fast = workers
    first = slow.claim("stage", 20)
    slow_shards = [next(first)]
    fast_shards = list(fast.claim("stage", 20))
    slow_shards += list(first)
    assert len(slow_shards) == 1 and sorted(slow_shards + fast_shards) == list(range(20))
    assert list(fast.claim("another stage", 3)) == [0, 1, 2]


def test_shards_are_claimed_again_after_a_restart(workers):
    assert list(workers[0].claim("stage", 3)) == [0, 1, 2]
    restarted = Worker(1, 2, 1, workers[1].store, attempt=1)
    assert list(restarted.claim("stage", 3)) == [0, 1, 2]


def test_barrier_waits_for_all_workers(workers):
    passed = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: (workers[1].barrier("here"), passed.set()))
        assert not passed.wait(0.3)
        workers[0].barrier("here")
        waiting.result(timeout=30)
    assert passed.is_set()


def test_progress_is_summed_over_workers(workers):
    assert workers[0].count_done("stage", 5) == 5
    assert workers[1].count_done("stage", 2) == 7
    single = Worker()
    assert [single.count_done("stage", 5), single.count_done("stage", 2)] == [5, 7]
    assert list(single.claim("stage", 3)) == [0, 1, 2] and single.is_main
    single.barrier("here")


@pytest.mark.parametrize(("begin", "count", "workers"), [(0, 8, 2), (24, 8, 4), (5, 7, 3), (0, 0, 2), (3, 1, 2)])
def test_shares_of_all_workers_in_order_form_the_range(begin, count, workers):
    shares = [Worker(rank, workers).share(begin, count) for rank in range(workers)]
    assert [number for share in shares for number in share] == list(range(begin, begin + count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_ranks_from_the_environment_of_slurm(monkeypatch, tmp_path):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text("#!/bin/sh\necho localhost\necho elsewhere\n")
    scontrol.chmod(0o755)
    job = free_port() - 20000
    for key, value in {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": "localhost,elsewhere",
        "SLURM_JOB_ID": str(job if job >= 0 else job % 20000),
    }.items():
        monkeypatch.setenv(key, value)
    main = distributed.current()
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    second = distributed.current()
    assert (main.rank, main.count, main.is_main) == (0, 2, True)
    assert (second.rank, second.local_rank, second.is_main) == (1, 1, False)
    assert sorted([*main.claim("stage", 1), *second.claim("stage", 1)]) == [0]


@pytest.mark.parametrize(("rank", "agent", "serves"), [(0, None, True), (0, "True", False), (1, None, False)])
def test_the_main_worker_serves_the_store_unless_torchrun_does(monkeypatch, rank, agent, serves):
    stores = []
    monkeypatch.setattr("torch.distributed.TCPStore", lambda *arguments, **_: stores.append(arguments))
    for key, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1234}.items():
        monkeypatch.setenv(key, str(value))
    if agent:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    distributed.current()
    assert stores[0][:4] == ("localhost", 1234, 2, serves)


@pytest.mark.parametrize("key", ["RANK", "WORLD_SIZE"])
def test_one_of_torchruns_variables_alone_means_nothing(monkeypatch, key):
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(key, "3")
    assert distributed.current() == Worker()


def test_single_worker_without_environment_variables(monkeypatch):
    for key in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(key, raising=False)
    assert distributed.current() == Worker()


def test_count_gpus(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="--gpus 8: this machine has 1 CUDA device "):
        distributed.count_gpus(8, 1)
    assert distributed.count_gpus(None, 1) == 1 and distributed.count_gpus(None, 4) == 0
    assert distributed.count_gpus(0, 1) == 0
    with pytest.raises(UserError, match="not both"):
        distributed.count_gpus(1, 2)


def test_failure_of_a_worker_ends_the_barriers_of_others(workers):
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(workers[1].barrier, "here")
        workers[0].fail("no weights")
        with pytest.raises(UserError, match="worker 0 stopped: no weights"):
            waiting.result(timeout=30)


def test_device_of_each_worker(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [Worker(r, 8, r).device("cuda") for r in (0, 3, 5)] == ["cuda:0", "cuda:3", "cuda:1"]
    assert Worker().device("cpu") == "cpu"


@pytest.mark.parametrize(("cores", "workers", "threads"), [(16, 8, 2), (128, 8, 16), (12, 8, 1), (2, 8, 1), (5, 1, 5)])
def test_workers_share_the_cores_of_the_machine(cores, workers, threads):
    assert distributed.threads_per_worker(cores, workers) == threads


def test_a_gpu_that_cannot_be_warmed_up_is_left_to_its_first_use():
    warming = distributed.warm_up("cuda:99")
    warming.join(60)
    assert not warming.is_alive()
