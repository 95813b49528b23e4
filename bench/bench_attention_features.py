# SPDX-License-Identifier: MIT
"""attention_features with the CLS row, log-sum-exp and key norms, compared with torch's attention without them.

`pytest bench/bench_attention_features.py --benchmark-only -s` prints the tables.
"""

import contextlib
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

import namedmask_kernels as nk
from common import Work, paired_medians, report, report_gpu, reset_peak_memory, resident_memory, threads

HEADS, DIM = 6, 64  # ViT-S


def inputs(tokens, dtype):
    """(qkv, offsets) of one sequence."""
    torch.manual_seed(0)
    return torch.randn(tokens, 3, HEADS, DIM).to(dtype), torch.tensor([0, tokens], dtype=torch.int32)


def sdpa(qkv, offsets):
    return F.scaled_dot_product_attention(*qkv.permute(1, 2, 0, 3)[:, None])[0].transpose(0, 1)


def explicit(qkv, offsets):
    """Attention that stores all weights; returns the output and the CLS row."""
    q, k, v = qkv.permute(1, 2, 0, 3)
    weights = (q @ k.mT * DIM**-0.5).softmax(-1)
    return weights @ v, weights[:, 0]


METHODS = {"attention_features": nk.attention_features, "torch SDPA (no row)": sdpa, "matmul-softmax-matmul": explicit}


@pytest.mark.parametrize("count", [1, 2], ids=["one thread", "two threads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [785, 3601])
def test_one_sequence(benchmark, tokens, dtype, count, quick):
    if quick and tokens > 1000:
        pytest.skip("large size")
    short = inputs(785, dtype)
    exact = nk.attention_features(short[0].double(), short[1], backend="reference")
    result = nk.attention_features(*short)
    assert (result.output - exact.output).norm() <= 2 * (sdpa(*short) - exact.output).norm()
    torch.testing.assert_close(result.rows.double(), exact.rows, rtol=1e-5, atol=0)

    batch, square = inputs(tokens, dtype), {t: torch.randn(1024, 1024).to(t) for t in (torch.float32, dtype)}
    calls = {method: lambda call=call: call(*batch) for method, call in METHODS.items()}
    calls |= {f"{str(t)[6:]} product 1024^3": lambda a=a: a @ a for t, a in square.items()}
    with threads(count):
        seconds = paired_medians(calls, rounds=9, seconds=15)
        benchmark.pedantic(calls["attention_features"], rounds=3)
    rates = {method: 2 * 1024**3 / seconds.pop(method) for method in list(seconds) if "product" in method}
    flops, ceiling = 4 * HEADS * tokens**2 * DIM, rates["float32 product 1024^3"]
    report(
        f"attention_features, {HEADS} x {DIM}, {tokens} tokens, {str(dtype)[6:]}, {count} threads; torch's "
        + ", ".join(f"{method}: {rate / 1e9:.3g} GFLOP/s" for method, rate in rates.items()),
        [
            {"method": m, "ms": 1e3 * s, "time / ours": s / seconds["attention_features"], "GFLOP/s": flops / s / 1e9,
             "share of the float32 product": flops / s / ceiling}
            for m, s in seconds.items()
        ],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_memory(benchmark, dtype, quick):
    """Memory that a call adds while it runs, including its outputs: it does not grow with the square of the tokens.

    One byte for each attention weight would take a seventh (float32) of the explicit method. The kernel's counters of
    resident memory are off by several MiB, so that ratios of small figures decide nothing.
    """
    sizes = (2048, 4096) if quick else (3601, 7202)
    rows = []
    for method, call in METHODS.items():
        call(*inputs(64, dtype))  # allocates the buffers of libraries
        rows.append({"method": method} | {f"{n} tokens, MiB": added_memory(call, *inputs(n, dtype)) for n in sizes})
    benchmark.pedantic(nk.attention_features, inputs(sizes[0], dtype), rounds=1)
    report(f"attention, memory of a call, {HEADS} x {DIM}, {str(dtype)[6:]}", rows)
    ours, _, stored = (row[f"{sizes[1]} tokens, MiB"] for row in rows)
    assert ours < 0.1 * stored


def added_memory(call, *args):
    """Peak of resident memory during a call above its value before, in MiB."""
    reset_peak_memory()
    before = resident_memory("VmRSS")
    call(*args)
    return resident_memory() - before


def peers_on_gpu(packed, offsets):
    """Attention in torch without a row of weights: (name, call), or None for a kernel that cannot run here.

    Torch's scaled_dot_product_attention takes sequences of equal length as one dense batch, others one at a time.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    lengths = offsets.diff().tolist()
    groups = [packed] if len(set(lengths)) == 1 else packed.split(lengths)
    count = len(lengths) // len(groups)
    # [3, n, H, N, D] each
    dense = [part.unflatten(0, (count, len(part) // count)).permute(2, 0, 3, 1, 4) for part in groups]

    def sdpa(*kernels):
        with sdpa_kernel([*kernels]) if kernels else contextlib.nullcontext():
            return [F.scaled_dot_product_attention(*part) for part in dense]

    calls = {
        "torch SDPA (no row)": sdpa,
        "torch SDPA, cuDNN (no row)": functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION),
        "torch SDPA, flash (no row)": functools.partial(sdpa, SDPBackend.FLASH_ATTENTION),
    }
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        calls["torch varlen_attn (no row)"] = None
    else:
        ends, longest = offsets.to(packed.device), max(lengths)
        calls["torch varlen_attn (no row)"] = lambda: varlen_attn(*packed.unbind(1), ends, ends, longest, longest)
    for method, call in calls.items():
        try:
            runs = call is not None and call() is not None
        except RuntimeError:
            runs = False
        yield method, call if runs else None


MIXED = tuple(range(1673, 5922, 283))  # 16 lengths


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(
    "lengths",
    [(785,) * 16, (785,) * 64, (1601,) * 32, (3601,) * 16, (5505,) * 16, MIXED],
    ids=lambda lengths: f"{len(lengths)} of {'mixed lengths' if lengths is MIXED else lengths[0]}",
)
def test_batch_on_gpu(benchmark, lengths, dtype):
    """Single calls, and eight in a row, which show what the GPU does while it does not wait for the host."""
    tokens = f"{min(lengths)} to {max(lengths)}" if len(set(lengths)) > 1 else lengths[0]
    title = f"attention_features, {HEADS} x {DIM}, {len(lengths)} images of {tokens} tokens, {str(dtype)[6:]}, on a GPU"

    def calls():
        qkv, _ = inputs(sum(lengths), dtype)
        offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        packed, first = qkv.cuda(), qkv[: lengths[0]]
        exact = nk.attention_features(first.double(), offsets[:2], backend="reference")
        result = nk.attention_features(packed, offsets)
        error = (sdpa(first.cuda(), None).cpu() - exact.output).norm()
        assert (result.output[: lengths[0]].cpu() - exact.output).norm() <= 2 * error
        torch.testing.assert_close(result.rows[: lengths[0]].cpu().double(), exact.rows, rtol=1e-4, atol=1e-9)
        ours = {
            "triton": lambda: nk.attention_features(packed, offsets),
            "triton, output only": lambda: nk.attention_features(packed, offsets, want=["output"]),
        }
        flops = 4.0 * sum(n**2 for n in lengths) * HEADS * DIM
        for method, call in itertools.chain(ours.items(), peers_on_gpu(packed, offsets)):
            yield method, call, Work(flops=flops, dtype=dtype)
            if call is not None:
                eight = Work(flops=8 * flops, dtype=dtype, images=8 * len(lengths))
                yield f"{method}, 8 calls in a row", lambda call=call: [call() for _ in range(8)], eight

    report_gpu(title, calls, len(lengths), benchmark)
