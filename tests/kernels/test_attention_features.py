# SPDX-License-Identifier: MIT
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import namedmask_kernels as nk
from namedmask_kernels import AttentionFeatures

BACKENDS = ["cpu", "reference"]
LENGTHS = (65, 1, 0, 197, 64, 193, 3)


def packed(lengths, heads=3, dim=64, dtype=torch.float32, seed=0):
    """(qkv, offsets) of random sequences."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3, heads, dim, generator=generator).to(dtype)
    return qkv, torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def exact(qkv, offsets, **settings):
    return nk.attention_features(qkv.double(), offsets, backend="reference", **settings)


def sdpa(qkv, offsets):
    """torch's scaled_dot_product_attention, one sequence at a time."""
    out = [qkv[:0, 0]]
    for begin, end in itertools.pairwise(offsets):
        q, k, v = qkv[begin:end].permute(1, 2, 0, 3)[:, None]
        out.append(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1))
    return torch.cat(out)


def same(a, b):
    """Equal bits in every field."""
    return all((x is y) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [32, 48, 64, 80, 128])
def test_error_is_at_most_twice_that_of_torch(backend, dim, dtype):
    qkv, offsets = packed(LENGTHS, dim=dim, dtype=dtype)
    expected = exact(qkv, offsets)
    result = nk.attention_features(qkv, offsets, backend=backend)
    assert result.output.dtype == dtype and result.output.shape == (len(qkv), 3, dim)
    error, torch_error = (x.double() - expected.output for x in (result.output, sdpa(qkv, offsets)))
    # In float32 the largest of 10^5 errors varies by chance: allow the rounding that any order of the sums may cause.
    assert error.norm() <= 2 * torch_error.norm()
    assert error.abs().max() <= max(2 * torch_error.abs().max(), 3e-6)
    for name in ("rows", "lse", "key_norms"):
        assert getattr(result, name).dtype == torch.float32
    torch.testing.assert_close(result.rows.double(), expected.rows, rtol=5e-6, atol=0)
    for rows in result.rows.double().split([n for n in LENGTHS if n]):
        torch.testing.assert_close(rows.sum(0), torch.ones(3, 1, dtype=torch.float64), rtol=0, atol=1e-5)
    # bfloat16 scores may be computed with 16-bit integers: off by about 1e-5 |q| |k| scale, here = 1e-5 sqrt(dim).
    fixed = dtype == torch.bfloat16 and backend == "cpu"
    torch.testing.assert_close(result.lse.double(), expected.lse, rtol=0, atol=1e-5 * dim**0.5 if fixed else 2e-6)
    torch.testing.assert_close(result.key_norms.double(), expected.key_norms, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dim", [1, 7, 16, 17, 33, 63, 200, 256])
@pytest.mark.parametrize("length", [1, 2, 63, 129, 192, 193])
def test_odd_sizes(dim, length):
    qkv, offsets = packed([length], heads=2, dim=dim)
    result, expected = nk.attention_features(qkv, offsets, tap_rows=[length - 1, 0]), exact(qkv, offsets)
    torch.testing.assert_close(result.output.double(), expected.output, rtol=0, atol=4e-6)
    torch.testing.assert_close(result.rows[..., 1].double(), expected.rows[..., 0], rtol=1e-5, atol=0)
    torch.testing.assert_close(result.lse.double(), expected.lse, rtol=0, atol=4e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("taps", [1, 5, [3, 0, 64, 3], list(range(40)), 0, []], ids=str)
def test_tapped_rows_are_softmax_weights_of_the_queries(backend, taps):
    qkv, offsets = packed((65, 130), dim=48)
    result = nk.attention_features(qkv, offsets, tap_rows=taps, backend=backend)
    indices = list(range(taps)) if isinstance(taps, int) else taps
    assert result.rows.shape == (195, 3, len(indices))
    for begin, end in ((0, 65), (65, 195)):
        q, k, _ = qkv[begin:end].double().permute(1, 2, 0, 3)
        weights = (q @ k.mT * 48**-0.5).softmax(-1)[:, indices].permute(2, 0, 1)
        torch.testing.assert_close(result.rows[begin:end].double(), weights, rtol=5e-6, atol=0)
        sums = result.rows[begin:end].double().sum(0)
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_and_large_scores(backend):
    """Scores of hundreds: the softmax subtracts the maximum, and weights too small for float32 are 0."""
    qkv, offsets = packed((100, 70), dim=32)
    for scale in (30.0, 0.0, -2.0):
        expected = exact(qkv, offsets, scale=scale)
        result = nk.attention_features(qkv, offsets, scale=scale, backend=backend)
        tolerance = 1e-6 * max(1.0, expected.lse.abs().max().item())
        torch.testing.assert_close(result.output.double(), expected.output, rtol=0, atol=10 * tolerance)
        torch.testing.assert_close(result.rows.double(), expected.rows, rtol=10 * tolerance, atol=1e-37)
        torch.testing.assert_close(result.lse.double(), expected.lse, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_conversions_equal_torch(dtype):
    """A sequence of one token returns its value: for every finite 16-bit number, and NaN and Inf."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    qkv = torch.zeros(2**15, 3, 2, 1, dtype=dtype)
    qkv[:, 2] = numbers.reshape(-1, 2, 1)
    offsets = torch.arange(2**15 + 1, dtype=torch.int32)
    result = nk.attention_features(qkv, offsets, want=["output"]).output.flatten()
    finite = numbers.isfinite()
    expected = numbers[finite]
    if dtype == torch.bfloat16:  # CPUs' bfloat16 instructions take numbers below 2^-126 as 0
        expected = expected.where((expected.abs() >= 2.0**-126) | (result[finite] != 0), 0)
    assert torch.equal(result[finite], expected) and not result[~finite].isfinite().any()
    # Means of two 16-bit numbers lie between representable numbers, and on ties.
    qkv = torch.zeros(2**15 - 2, 3, 1, 1, dtype=dtype)
    size = numbers.float().abs()
    pairs = numbers[(size < 1e37) & ((size > 1e-36) | (size == 0))].float()  # sums and halves stay in the normal range
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))][: 2**14 - 1]
    near = (pairs + pairs.abs() * torch.finfo(dtype).eps).to(dtype).nan_to_num(0, 0, 0)
    qkv[:, 2, 0, 0] = torch.stack([pairs.to(dtype), near], 1).flatten()
    offsets = torch.arange(0, len(qkv) + 1, 2, dtype=torch.int32)
    result = nk.attention_features(qkv, offsets, want=["output"]).output
    expected = (0.5 * qkv[0::2, 2].float() + 0.5 * qkv[1::2, 2].float()).to(dtype)
    assert torch.equal(result[0::2], expected) and torch.equal(result[1::2], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_stays_in_its_sequence_and_head(dtype):
    qkv, offsets = packed((70, 80), dtype=dtype)
    clean = nk.attention_features(qkv, offsets)
    qkv[100, 1, 1, 5] = float("nan")
    result = nk.attention_features(qkv, offsets)
    assert all(field[70:, 1].isnan().all() for field in (result.output, result.rows, result.lse))
    for heads in (0, 2):
        assert torch.equal(result.output[:, heads], clean.output[:, heads])
    assert torch.equal(result.output[:70], clean.output[:70]) and torch.equal(result.rows[:70], clean.rows[:70])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_do_not_depend_on_batch_composition(backend, dtype):
    qkv, offsets = packed(LENGTHS, dim=80, dtype=dtype)
    batch = nk.attention_features(qkv, offsets, backend=backend)
    for begin, end in itertools.pairwise(offsets.tolist()):
        alone = nk.attention_features(
            qkv[begin:end], torch.tensor([0, end - begin], dtype=torch.int32), backend=backend
        )
        assert same(alone, (field[begin:end] for field in batch))


def test_results_do_not_depend_on_the_number_of_threads(on_threads):
    qkv, offsets = packed((400, 33, 250))
    first, *others = on_threads(lambda: nk.attention_features(qkv, offsets))
    assert all(same(other, first) for other in others)


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16"])
def test_instruction_levels(level, tmp_path, run_at_level):
    inputs = {dtype: packed(LENGTHS, dim=80, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    torch.save(list(inputs.values()), tmp_path / "in.pt")
    code = (
        "import sys, torch, namedmask_kernels as nk\n"
        "inputs = torch.load(sys.argv[1] + '/in.pt')\n"
        "torch.save([tuple(nk.attention_features(*one)) for one in inputs], sys.argv[1] + '/out.pt')\n"
    )
    run_at_level(level, code)
    for (dtype, batch), result in zip(inputs.items(), torch.load(tmp_path / "out.pt"), strict=True):
        expected, result = exact(*batch), AttentionFeatures(*result)
        rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 3e-6
        torch.testing.assert_close(result.output.double(), expected.output, rtol=rounding, atol=rounding)
        lse = 1e-4 if dtype == torch.bfloat16 and level == "avx512_vnni" else 3e-6
        torch.testing.assert_close(result.lse.double(), expected.lse, rtol=0, atol=lse)
        torch.testing.assert_close(result.rows.double(), expected.rows, rtol=1e-5, atol=0)
        torch.testing.assert_close(result.key_norms.double(), expected.key_norms, rtol=1e-5, atol=0)


def errors(qkv, offsets, scale=None):
    """Norms of the errors of attention_features and of torch's attention in the dtype of qkv."""
    expected = exact(qkv, offsets, scale=scale, want=["output"]).output
    q, k, v = qkv.permute(1, 2, 0, 3)[:, None]
    torch_output = F.scaled_dot_product_attention(q, k, v, scale=scale)[0].transpose(0, 1)
    output = nk.attention_features(qkv, offsets, scale=scale, want=["output"]).output
    return (output.double() - expected).norm(), (torch_output.double() - expected).norm()


@pytest.mark.parametrize("dim", [40, 64])
@pytest.mark.parametrize("case", ["outlier channels", "sink", "tiny and huge", "large scores", "rising scores"])
def test_bfloat16_inputs_that_are_hard(case, dim):
    """Rows dominated by one element, a key with nearly all the weight, numbers far from 1, scores of dozens, and each
    block of keys with larger scores than all before it."""
    qkv, offsets = packed((300,), dim=dim)
    scale = dim**-0.5
    if case == "outlier channels":
        qkv[:, :2, :, 3] *= 40
        scale /= 40
    elif case == "sink":
        qkv[0, 1] = 6 * qkv[:, 0].mean(0) + 1
        qkv[:, 0] += 1
        qkv[0, 2] *= 1e-3
    elif case == "tiny and huge":
        qkv[:, 0] *= 2.0**90
        qkv[:, 1] *= 2.0**-90
        qkv[5, :2] = 0
        qkv[6, 1] *= 2.0**-36  # below 2^-100, treated as 0
    elif case == "rising scores":
        qkv[:, 0, :, 0] = 8
        qkv[:, 1, :, 0] += torch.linspace(0, 60, 300)[:, None]
    else:
        scale = 2.0
    error, torch_error = errors(qkv.bfloat16(), offsets, scale)
    assert error <= 2 * torch_error


@pytest.mark.parametrize("backend", BACKENDS)
def test_returns_only_the_requested_fields(backend):
    qkv, offsets = packed((40, 25), dim=32)
    everything = nk.attention_features(qkv, offsets, backend=backend)
    for want in (("output",), ("rows",), ("lse",), ("key_norms",), ("lse", "rows"), ()):
        result = nk.attention_features(qkv, offsets, want=want, backend=backend)
        for name in AttentionFeatures._fields:
            if name in want:
                assert torch.equal(getattr(result, name), getattr(everything, name))
            else:
                assert getattr(result, name) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    for lengths in ((), (0,), (0, 0)):
        result = nk.attention_features(*packed(lengths, dim=32), backend=backend)
        assert result.output.shape == (0, 3, 32) and result.rows.shape == (0, 3, 1) and result.key_norms.shape == (0,)
    result = nk.attention_features(torch.zeros(5, 3, 0, 8), torch.tensor([0, 5], dtype=torch.int32), backend=backend)
    assert result.output.shape == (5, 0, 8) and not result.key_norms.any()


def test_non_contiguous_views():
    qkv, offsets = packed((30, 41), heads=4, dim=40)
    view = qkv.permute(0, 1, 3, 2)[..., ::2].permute(0, 1, 3, 2)[..., 3:35]
    wide = torch.stack([offsets, offsets], 1)[:, 0]
    assert same(nk.attention_features(view, wide), nk.attention_features(view.contiguous(), offsets))


def test_every_output_is_written(monkeypatch):
    qkv, offsets = packed(LENGTHS, dim=32)
    expected = nk.attention_features(qkv, offsets, tap_rows=1)
    plain = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: plain(*a, **k).fill_(float("nan")))
    assert same(nk.attention_features(qkv, offsets), expected)
    reference = nk.attention_features(qkv, offsets, backend="reference")
    assert not any(field.isnan().any() for field in reference)


def test_only_the_reference_accepts_float64():
    qkv, offsets = packed((9,), dim=8)
    assert all(field.dtype == torch.float64 for field in exact(qkv, offsets))
    with pytest.raises(TypeError, match=r"attention_features: qkv must be .* for the cpu backend, but is float64"):
        nk.attention_features(qkv.double(), offsets)


@pytest.mark.parametrize("backend", BACKENDS)
def test_invalid_arguments_raise(backend):
    def raises(error, message, *args, **settings):
        with pytest.raises(error, match=f"attention_features: {message}"):
            nk.attention_features(*args, **({"backend": backend} | settings))

    qkv, offsets = packed((4, 6), dim=8)
    raises(TypeError, "qkv must be a torch tensor, but is ndarray", qkv.numpy(), offsets)
    raises(TypeError, "offsets must be a torch tensor, but is list", qkv, [0, 10])
    raises(TypeError, r"qkv must be float32 or .*, but is int64", qkv.long(), offsets)
    raises(TypeError, "offsets must be int32, but is int64", qkv, offsets.long())
    raises(ValueError, r"qkv must be \[T, 3, H, D\] .* but has shape \[10, 2, 3, 8\]", qkv[:, :2], offsets)
    wide = torch.zeros(10, 3, 3, 257)
    raises(ValueError, r"qkv must be .* D from 1 to 256, but has shape \[10, 3, 3, 257\]", wide, offsets)
    raises(ValueError, r"offsets must be \[B \+ 1\] on cpu, but has shape \[0\]", qkv, offsets[:0])
    raises(ValueError, "offsets must run from 0 to the 10 tokens of qkv, but run from 0 to 4", qkv, offsets[:2])
    raises(ValueError, "offsets must run from 0 to the 10 tokens of qkv, but run from 4 to 10", qkv, offsets[1:])
    backwards = torch.tensor([0, 7, 4, 10], dtype=torch.int32)
    raises(ValueError, "offsets must not decrease, but sequence 1 runs from 7 to 4", qkv, backwards)
    message = "tap_rows must lie inside every sequence, but row 4 is asked for and sequence 0 has 4 tokens"
    raises(ValueError, message, qkv, offsets, tap_rows=5)
    raises(ValueError, message, qkv, offsets, tap_rows=[4, 1])
    second = torch.tensor([0, 6, 10], dtype=torch.int32)
    raises(ValueError, "tap_rows .* row 4 is asked for and sequence 1 has 4 tokens", qkv, second, tap_rows=5)
    raises(ValueError, "tap_rows must be at least 0, but is -1", qkv, offsets, tap_rows=-1)
    raises(ValueError, "tap_rows must be at least 0, but is -2", qkv, offsets, tap_rows=[0, -2])
    raises(ValueError, r"want must be a subset of output, .*, but is 'rows'", qkv, offsets, want="rows")
    raises(ValueError, r"want must be a subset of .*, but is \('keys',\)", qkv, offsets, want=("keys",))
    for want in (None, 5, [["rows"]]):
        raises(ValueError, r"want must be a subset of .*, but is ", qkv, offsets, want=want)
    raises(ValueError, "backend 'cuda' cannot run", qkv, offsets, backend="cuda")
    with pytest.raises(RuntimeError, match="attention_features has no gradient"):
        nk.attention_features(qkv.requires_grad_(), offsets, backend=backend)
    with torch.no_grad():
        nk.attention_features(qkv, offsets, backend=backend)


def test_opcheck():
    qkv, offsets = packed((4, 6), dim=8)
    op = torch.ops.namedmask_kernels.attention_features
    torch.library.opcheck(op, (qkv, offsets, 0.3, [0, 2], True, True, True, True, "cpu"))
    torch.library.opcheck(op, (qkv.half(), offsets, 0.3, [], True, False, False, False, "cpu"))
