# SPDX-License-Identifier: MIT
"""attention_features with the CLS row, log-sum-exps and key norms, beside torch's attention, which gives none of them.

`pytest bench/bench_attention_features.py --benchmark-only -s` prints the tables.
"""

import pytest
import torch
import torch.nn.functional as F

import namedmask_kernels as nk
from common import paired_medians, report, threads

HEADS, DIM = 6, 64  # ViT-S


def explicit(q, k, v):
    """Attention with all weights in memory: the output and the CLS row."""
    weights = (q @ k.mT * DIM**-0.5).softmax(-1)
    return weights @ v, weights[..., 0, :]


@pytest.mark.parametrize("count", [1, 2], ids=["one thread", "two threads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [785, 3601])
def test_one_sequence(benchmark, tokens, dtype, count):
    torch.manual_seed(0)
    qkv = torch.randn(tokens, 3, HEADS, DIM).to(dtype)
    offsets = torch.tensor([0, tokens], dtype=torch.int32)
    q, k, v = qkv.permute(1, 2, 0, 3)[:, None]

    exact = nk.attention_features(qkv[:785].double(), torch.tensor([0, min(785, tokens)], dtype=torch.int32),
                                  backend="reference")  # fmt: skip
    short = nk.attention_features(qkv[:785], torch.tensor([0, 785], dtype=torch.int32))
    theirs = F.scaled_dot_product_attention(q[..., :785, :], k[..., :785, :], v[..., :785, :])[0].transpose(0, 1)
    assert (short.output - exact.output).norm() <= 2 * (theirs - exact.output).norm()
    torch.testing.assert_close(short.rows.double(), exact.rows, rtol=1e-5, atol=0)

    a = torch.randn(1024, 1024)
    calls = {
        "cpu": lambda: nk.attention_features(qkv, offsets),
        "cpu, output only": lambda: nk.attention_features(qkv, offsets, want=("output",)),
        "torch SDPA (no row)": lambda: F.scaled_dot_product_attention(q, k, v),
        "float32 product 1024^3": lambda: a @ a,
    }
    if dtype == torch.float32 or tokens < 1000:  # in bfloat16 it takes 20 s where the CPU has no bfloat16 arithmetic
        calls["torch matmul-softmax-matmul"] = lambda: explicit(q, k, v)
    with threads(count):
        seconds = paired_medians(calls, rounds=9, seconds=30)
        benchmark.pedantic(calls["cpu"], rounds=3)
    flops = 4 * HEADS * tokens**2 * DIM
    ceiling = 2 * 1024**3 / seconds.pop("float32 product 1024^3")
    report(
        f"attention_features, {HEADS} x {DIM}, {tokens} tokens, {str(dtype)[6:]}, {count} threads; "
        f"ceiling: torch's float32 product, {ceiling / 1e9:.3g} GFLOP/s",
        [
            {"who": who, "ms": 1e3 * s, "times cpu's": s / seconds["cpu"], "GFLOP/s": flops / s / 1e9,
             "share of the ceiling": flops / s / ceiling}
            for who, s in seconds.items()
        ],
    )  # fmt: skip
