# SPDX-License-Identifier: MIT
"""Signals, output streams, the environment, and numbers that no machine can take: each ends with one line."""

import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest

from namedmask import distributed, process
from namedmask.config import make_config, nest, settings
from namedmask.errors import UserError, explained
from namedmask.evaluate.folders import print_table
from namedmask.threads import thread_count
from small_world import command

# `namedmask doctor`, which waits for a signal, perhaps in an import.
WAITING = """
import sys, time
import namedmask.doctor
from namedmask import __main__
def wait():
    if {importing}:
        open("slow.py", "w").write("import time; print('here', flush=True); time.sleep(60)")
        sys.path.insert(0, ".")
        import slow
    print("here", flush=True)
    time.sleep(60)
namedmask.doctor.examine = wait
sys.argv = ["namedmask", "doctor"]
__main__.main()
"""
# Ctrl-C while namedmask.__main__ imports its first module after `__future__` and `sys`.
EARLY = """
import __future__, sys, namedmask
class Raising:
    def find_spec(*_):
        raise KeyboardInterrupt
path = namedmask.__path__[0] + "/__main__.py"
code = compile(open(path).read(), path, "exec")
sys.meta_path.insert(0, Raising)
exec(code, {"__name__": "namedmask.__main__", "__package__": "namedmask"})
"""


def python(code: str, *arguments: str, **options):
    """A Python process with the signals of a foreground process: shells make background processes ignore Ctrl-C."""
    restore = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    command = [sys.executable, "-c", code, *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen(command, preexec_fn=restore, **streams)


@pytest.mark.parametrize("importing", [False, True])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line(tmp_path, signum, importing):
    with python(WAITING.format(importing=importing), cwd=tmp_path) as run:
        assert run.stdout.readline() == "here\n"
        run.send_signal(signum)
        _, errors = run.communicate()
    reason = "interrupted" if signum == signal.SIGINT else "ended by SIGTERM"
    assert re.fullmatch(f"namedmask: {reason}(; run the same command again to continue)?\n", errors), errors
    assert run.returncode == 128 + signum


# Ctrl-C in a callback of torch, whose C++ code replaces the exception by a ValueError.
REPLACED = """
import signal, sys
import torch
import namedmask.doctor
from namedmask import __main__, errors
class Sequence:
    def __len__(self):
        return 1
    def __getitem__(self, index):
        signal.raise_signal(signal.SIGINT)
def examine(*_):
    try:
        torch.asarray(Sequence())
    except ValueError as error:
        if {explained}:
            raise errors.UserError("DIR/file cannot be read") from error
        raise
namedmask.doctor.examine = examine
sys.argv = ["namedmask", "doctor"]
__main__.main()
"""


@pytest.mark.parametrize("explained", [False, True])
def test_a_signal_that_c_code_replaces_is_not_taken_for_an_error(explained):
    with python(REPLACED.format(explained=explained)) as run:
        _, errors = run.communicate()
    assert run.returncode == 130 and errors == "namedmask: interrupted; run the same command again to continue\n"


def test_errors_after_a_signal_of_an_earlier_command_stay_errors(monkeypatch):
    monkeypatch.setattr(process, "_received", process.Interrupted())
    with pytest.raises(ValueError, match="later"), process.keeping_interruption():
        raise ValueError("later")


def test_a_signal_in_an_import_ends_the_process_at_once(monkeypatch):
    """An exception in an import could be taken for a missing package."""

    class Ended(BaseException):
        pass

    def end(code):
        raise Ended(code)

    written = []
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(os, "write", lambda descriptor, text: written.append((descriptor, text)))
    caller = compile("(lambda: __import__('sys')._getframe())()", "<frozen importlib._bootstrap>", "eval")
    with pytest.raises(Ended, match="130"):
        process._interrupt(signal.SIGINT, eval(caller))
    assert written == [(2, b"namedmask: interrupted\n")]
    with pytest.raises(process.Interrupted):
        process._interrupt(signal.SIGINT, sys._getframe())


def test_ctrl_c_before_the_first_import_is_one_line():
    with python(EARLY) as run:
        _, errors = run.communicate()
    assert run.returncode == 130 and errors == "namedmask: interrupted\n"


WORKER = """
import os, sys, time
from namedmask import process
time.sleep(float(sys.argv[2]))
process.die_with(int(sys.argv[1]))
print("alive", flush=True)
time.sleep(60)
"""
LAUNCHER = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid()), sys.argv[2]])
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.parametrize("delay", ["0", "2"], ids=["before", "during its start"])
def test_a_worker_ends_with_its_launcher(delay):
    """Also if the launcher is killed before the worker has asked for the signal of its death."""
    with python(LAUNCHER, WORKER, delay) as launcher:
        worker = int(launcher.stdout.readline())
        if delay == "0":
            assert launcher.stdout.readline() == "alive\n"
        launcher.kill()
        launcher.wait()
        deadline = time.monotonic() + 20
        while (
            Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().split(")")[1][:3]
        ):
            assert time.monotonic() < deadline
            time.sleep(0.02)


PREPARED = "from namedmask import process; process.prepare(); "


def test_output_that_nobody_reads_is_dropped():
    code = PREPARED + "import sys\nfor _ in range(3): print('x' * 100_000, flush=True)\nprint('done', file=sys.stderr)"
    with python(code) as run:
        run.stdout.read(10)
        run.stdout.close()
        errors = run.stderr.read()
        run.wait()
    assert (run.returncode, errors) == (0, "done\n")


def test_output_on_a_full_device_is_one_line():
    with Path("/dev/full").open("w") as full:
        process = python("from namedmask.__main__ import main; main()", "--version", stdout=full)
        _, stderr = process.communicate()
    assert process.returncode == 2
    assert stderr == "namedmask: the output of the command could not be written: No space left on device\n"


def test_a_removed_folder_is_one_line(tmp_path):
    code = "import os; os.mkdir('a'); os.chdir('a'); os.rmdir('../a'); from namedmask.__main__ import main; main()"
    process = python(code, "--version", cwd=tmp_path)
    _, stderr = process.communicate()
    assert process.returncode == 2 and stderr.startswith("namedmask: the current folder has been removed")


def test_closed_output_and_ascii_terminals():
    code = (
        PREPARED
        + "import sys; print('caf\\xe9 \\udce9'); print('\\u25a0', file=sys.stderr); assert not sys.stdout.isatty()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf\\xe9 \\udce9\n", "\\u25a0\n")
    done = subprocess.run(f'{sys.executable} -c "{code}" >&-', shell=True, capture_output=True)
    assert done.returncode == 0


def test_errors_are_one_line_without_control_characters(capsys):
    process.complain("no photo in a\nb\x1b[31m caf\xe9 \udce9")
    assert capsys.readouterr().err == "namedmask: no photo in a\\nb\\x1b[31m caf\xe9 \\udce9\n"


def test_names_in_brackets_are_printed_as_they_are(capsys):
    names = ["[red]", "[/b]", "[bold]x[/bold]", ":smile:", "a" * 120]
    metrics = ("mean_iou", "mean_accuracy", "weighted_iou", "pixel_accuracy", "ignored_pixels")
    print_table(
        dict.fromkeys(metrics, 0.5) | {"photos": 2, "iou": dict.fromkeys(names, 0.5), "accuracy": dict.fromkeys(names)}
    )
    output = capsys.readouterr().out
    assert all(name in output for name in names[:4]) and output.count("a" * 40) >= 2


@pytest.mark.parametrize(("value", "threads"), [("3", 3), (" 3 ", 3), ("2,1", 2), ("", None), (" ", None)])
def test_omp_num_threads(monkeypatch, value, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    monkeypatch.setattr("namedmask_kernels.threads.usable_cores", lambda: 5)
    assert process.omp_num_threads() == threads and thread_count() == (threads or 5)


@pytest.mark.parametrize("value", ["0", "abc", "-1", "2.5", "4,x", "1000000000", "1,0", "\u0663"])
def test_malformed_omp_num_threads(monkeypatch, value):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    with pytest.raises(UserError, match=r"OMP_NUM_THREADS=.*: expected a number of threads from 1 to 1024"):
        thread_count()


@pytest.mark.parametrize("given, used", [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE")])
def test_threads_of_openmp_sleep_while_they_wait(given, used):
    code = "from namedmask import process; process.prepare(); import torch"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "true", **given}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert f"OMP_WAIT_POLICY = '{used}'" in done.stderr


def test_threads_follow_the_cores_that_the_process_may_use(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert thread_count() == 1
    monkeypatch.setattr("namedmask_kernels.threads.usable_cores", lambda: 5)
    assert thread_count() == 5
    with pytest.raises(UserError, match="--workers 100000: use at most 20 here; this process may use 5 cores"):
        distributed.count_gpus(None, 100_000)


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
SLURM = dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"), "0") | {"SLURM_STEP_NODELIST": "n"}
SLURM |= {"SLURM_STEP_NUM_TASKS": "2"}
WRONG_NUMBERS = {
    "RANK": ["x", "-1", "2", "0x1"],
    "WORLD_SIZE": ["0", "two", str(2**31), "9" * 30],
    "LOCAL_RANK": ["?"],
    "MASTER_PORT": ["0", "65536", "http"],
    "TORCHELASTIC_RESTART_COUNT": ["x"],
}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        *(
            (TORCHRUN | {name: value}, f"{name}='{value}' in the environment: expected an integer from")
            for name, values in WRONG_NUMBERS.items()
            for value in values
        ),
        (TORCHRUN | {"MASTER_ADDR": ""}, "RANK is set in the environment, but MASTER_ADDR is not"),
        (TORCHRUN | {"MASTER_PORT": ""}, "RANK is set in the environment, but MASTER_PORT is not"),
        (SLURM | {"SLURM_PROCID": "x"}, "SLURM_PROCID='x' in the environment"),
        (SLURM | {"SLURM_JOB_ID": ""}, "SLURM_STEP_NUM_TASKS is set in the environment, but SLURM_JOB_ID is not"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS='x' in the environment"),
        (SLURM, "`scontrol show hostnames n` failed: "),
    ],
)
def test_wrong_variables_of_a_launcher(monkeypatch, variables, message):
    monkeypatch.setenv("PATH", "")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="^" + re.escape(message)):
        distributed.current()


def test_an_unreachable_main_worker(monkeypatch):
    for name, value in (TORCHRUN | {"RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "CONNECT_WITHIN", timedelta(seconds=1))
    with pytest.raises(UserError, match=r"^worker 1 of 2 has no connection to localhost:29500: "):
        distributed.current()


def test_a_world_of_one_needs_no_address(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert distributed.current() == distributed.Worker(attempt=2)
    monkeypatch.delenv("WORLD_SIZE")
    assert distributed.current() == distributed.Worker()


ABSURD = ("-1e9", "1e9999", str(2**64), str(2**63), "1e300", "nan", "inf", "-inf", "x")
NUMBERS = [one for one in settings() if re.search(r"\b(int|float)\b", str(one.kind)) and not one.choices]


@pytest.mark.parametrize("one", NUMBERS, ids=lambda one: one.name)
@pytest.mark.parametrize("text", ABSURD)
def test_every_number_has_limits(one, text):
    count = str(one.kind).count(",") + 1 if str(one.kind).startswith("tuple") else 1
    with pytest.raises(UserError, match=f"wrong settings: {re.escape(one.name)}.*: .*expected|valid"):
        make_config({"photos": "p", **nest({one.name: one.parse(",".join([text] * count))})})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "p", "--workers", "0"], "--workers"),
        (["run", "p", "--workers", "x"], "--workers"),
        (["run", "p", "--workers", 2**64], "--workers"),
        (["run", "p", "--gpus", "-1"], "--gpus"),
        (["run", "p", "--gpus", 2**64], "--gpus"),
        (["run", "p", "--tau"], "--tau"),
        (["run", "p", "--tua", "1"], "--tau"),
        (["rum"], "run"),
        (["segment", "a"], "PHOTOS"),
        (["segment", "a", "b", "--out", "c", "--precision", "int"], "int"),
        (["evaluate", "a", "b", "--ignore", "-1"], "--ignore"),
        (["evaluate", "a", "b", "--ignore", 2**64], "--ignore"),
    ],
)
def test_errors_of_the_command_line_have_the_form_of_all_others(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p" / "cat").mkdir(parents=True)
    result = command(*words)
    assert result.exit_code == 2 and result.stdout == ""
    assert re.fullmatch(r"namedmask: [^\n]*\n", result.stderr) and message in result.stderr


def test_running_out_of_memory_is_explained(tmp_path):
    import numpy as np
    import torch

    def fail(allocate):
        with pytest.raises((RuntimeError, MemoryError)) as info:
            allocate()
        return explained(info.value)

    for allocate in (
        lambda: torch.empty(2**50),
        lambda: torch.empty(2**62, 4),
        lambda: np.empty(2**60, np.uint8),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
    ):
        assert isinstance(why := fail(allocate), UserError) and str(why).startswith("out of memory (")
    other = RuntimeError("shapes differ")
    assert explained(other) is other


def test_a_finished_command_ignores_signals_while_the_interpreter_exits():
    before = [signal.signal(signum, signal.SIG_DFL) for signum in process.SIGNALS]  # other tests may have ignored them
    try:
        process.handle_signals()
        with pytest.raises(process.Interrupted) as info:
            signal.raise_signal(signal.SIGTERM)
        assert info.value.exit_code == 143 and signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # a second one ends it
        process.handle_signals()
        process.end_handling()
        assert all(signal.getsignal(signum) == signal.SIG_IGN for signum in process.SIGNALS)
    finally:
        for signum, handler in zip(process.SIGNALS, before, strict=True):
            signal.signal(signum, handler)
