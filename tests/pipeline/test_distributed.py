# SPDX-License-Identifier: MIT
import itertools
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore, TCPStore

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


def test_tensors_are_summed_over_the_workers_of_an_attempt(monkeypatch, workers):
    import torch

    made = []
    monkeypatch.setattr(
        "torch.distributed.init_process_group", lambda *a, **k: made.append((*a, k["rank"], k["world_size"]))
    )
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: made.append("ended"))
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: tensor.mul_(2))
    monkeypatch.setattr("torch.cuda.set_device", made.append)
    for device, backend in (("cpu", "gloo"), ("cuda:1", "nccl")):
        with pytest.raises(RuntimeError), workers[1].collective(device):
            assert workers[1].sum(torch.ones(1)).item() == 2
            raise RuntimeError
        assert made == ([] if device == "cpu" else [device]) + [(backend, 1, 2), "ended"]
        made.clear()
    with Worker().collective("cuda:0"):
        assert Worker().sum(torch.ones(1)).item() == 1 and made == []


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
    monkeypatch.setattr(distributed, "_COMMANDS", itertools.count())  # as in another process
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    second = distributed.current()
    assert (main.rank, main.count, main.is_main) == (0, 2, True)
    assert (second.rank, second.local_rank, second.is_main) == (1, 1, False)
    assert sorted([*main.claim("stage", 1), *second.claim("stage", 1)]) == [0]


@pytest.fixture
def connections(monkeypatch):
    """What TCPStore is called with; no variables of a launcher are set."""
    for name in list(os.environ):
        if name.startswith(("SLURM", "TORCHELASTIC", "MASTER")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    stores = []

    def connect(*arguments, **more):
        stores.append((*arguments, more))
        return HashStore()

    monkeypatch.setattr("torch.distributed.TCPStore", connect)
    distributed._connect.cache_clear()
    yield stores
    distributed._connect.cache_clear()


def test_commands_of_one_process_have_their_own_counters(connections, monkeypatch):
    """A script may run several under torchrun; they share the connection."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1234}.items():
        monkeypatch.setenv(name, str(value))
    first, second = distributed.current(), distributed.current()
    assert len(connections) == 1
    for worker in (first, second):
        assert list(worker.claim("index", 3)) == [0, 1, 2] and worker.count_done("index", 5) == 5
    first.fail("lost")
    first.store.set("0/barrier/settled/open", "1")
    assert not second.store.check(["0/failed"]) and not second.store.check(["0/barrier/settled/open"])


@pytest.mark.parametrize(("rank", "agent", "serves"), [(0, None, True), (0, "True", False), (1, None, False)])
def test_the_main_worker_serves_the_store_unless_torchrun_does(monkeypatch, connections, rank, agent, serves):
    for key, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1234}.items():
        monkeypatch.setenv(key, str(value))
    if agent:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    distributed.current()
    assert connections[0][:4] == ("localhost", 1234, 2, serves)


@pytest.mark.parametrize(
    ("variables", "worker", "store"),
    [
        ({"RANK": 1, "WORLD_SIZE": 2, "MASTER_PORT": 1}, (1, 2, 0, 0), ("localhost", 1, 2, False)),
        (
            {
                "RANK": 0,
                "WORLD_SIZE": 2**31 - 1,
                "MASTER_PORT": 65535,
                "LOCAL_RANK": 3,
                "TORCHELASTIC_RESTART_COUNT": 2,
            },
            (0, 2**31 - 1, 3, 2),
            ("localhost", 65535, 2**31 - 1, True),
        ),
        (
            {"SLURM_PROCID": 1, "SLURM_STEP_NUM_TASKS": 2, "SLURM_JOB_ID": 43_210},
            (1, 2, 0, 0),
            ("n7", 23_210, 2, False),
        ),
        ({"SLURM_PROCID": 0, "SLURM_STEP_NUM_TASKS": 2, "SLURM_JOB_ID": 19_999}, (0, 2, 0, 0), ("n7", 39_999, 2, True)),
        ({"SLURM_PROCID": 0, "SLURM_STEP_NUM_TASKS": 1}, (0, 1, 0, 0), None),
        ({"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 5}, (0, 1, 0, 0), None),
    ],
)
def test_worker_of_the_environment(monkeypatch, connections, variables, worker, store):
    defaults = {"MASTER_ADDR": "localhost", "SLURM_STEP_NODELIST": "n[7-8]", "SLURM_LOCALID": 0}
    for name, value in (defaults | variables).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, "_first_slurm_host", lambda nodes: "n7")
    made = distributed.current()
    assert (made.rank, made.count, made.local_rank, made.attempt) == worker
    more = {"wait_for_workers": False}
    assert connections == ([] if store is None else [(*store, timedelta(minutes=5), more)])


def test_workers_wait_at_a_barrier_of_their_own_attempt(workers):
    workers[0].store.set("0/barrier/here/open", "1")
    workers[0].barrier("here")
    again = Worker(0, 2, 0, workers[0].store, attempt=1)
    again.fail("lost")
    workers[0].barrier("here")
    with pytest.raises(UserError, match="lost"):
        again.barrier("here")


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
    assert distributed.count_gpus(1, 1) == 1 and distributed.count_gpus(0, 2) == 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert distributed.count_gpus(None, 1) == 0
    with pytest.raises(UserError, match="--gpus 1: this machine has 0 CUDA devices "):
        distributed.count_gpus(1, 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert distributed.count_gpus(None, 1) == 1 and distributed.count_gpus(3, 1) == 3


@pytest.mark.parametrize(("cores", "limit"), [(1, 16), (4, 16), (5, 20)])
def test_up_to_four_workers_per_core(monkeypatch, cores, limit):
    monkeypatch.setattr("namedmask_kernels.threads.usable_cores", lambda: cores)
    assert distributed.count_gpus(None, limit) == 0
    with pytest.raises(UserError, match=f"--workers {limit + 1}: use at most {limit} here; .* {cores} core"):
        distributed.count_gpus(None, limit + 1)


def test_failure_of_a_worker_ends_the_barriers_of_others(workers):
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(workers[1].barrier, "here")
        workers[0].fail("no weights")
        with pytest.raises(UserError, match="worker 0 stopped: no weights"):
            waiting.result(timeout=30)


def test_failure_may_name_a_file_that_is_not_utf_8(workers):
    workers[0].fail("é\udce9\ud800: vanished")
    with pytest.raises(UserError, match=r"worker 0 stopped: é\\udce9\\ud800: vanished"):
        workers[1].barrier("here")


def test_device_of_each_worker(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [Worker(r, 8, r).device("cuda") for r in (0, 3, 5)] == ["cuda:0", "cuda:3", "cuda:1"]
    assert Worker().device("cpu") == "cpu"


def test_a_gpu_that_cannot_be_warmed_up_is_left_to_its_first_use():
    warming = distributed.warm_up("cuda:99")
    warming.join(60)
    assert not warming.is_alive()
