# SPDX-License-Identifier: MIT
import itertools

import pytest
import torch

from namedmask import attention
from namedmask_kernels import backends

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def exact(qkv, ends, scale):
    out = [qkv[:0, 0].double()]
    for begin, end in itertools.pairwise(ends):
        q, k, v = qkv[begin:end].double().permute(1, 2, 0, 3)
        out.append(((scale * q @ k.mT).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("library", attention.LIBRARIES)
def test_libraries_agree_and_do_not_depend_on_batch_composition(library, dtype):
    if reason := attention.obstacle(library, DEVICE, dtype):
        pytest.skip(reason)
    attend = attention.LIBRARIES[library]
    ends = [0, 65, 66, 66, 170]
    qkv = torch.randn(170, 3, 2, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    output, expected = attend(qkv, ends, 0.2), exact(qkv, ends, 0.2)
    assert output.shape == (170, 2, 64) and output.dtype == dtype
    assert (output - expected).norm() <= (1e-6 if dtype == torch.float32 else 4e-3) * expected.norm()
    for begin, end in itertools.pairwise(ends):
        assert torch.equal(attend(qkv[begin:end], [0, end - begin], 0.2), output[begin:end])
    assert attend(qkv[:0], [0], 0.2).shape == (0, 2, 64)


def test_a_library_that_fails_without_a_message_has_an_obstacle(monkeypatch):
    def fail(*arguments):
        raise NotImplementedError

    monkeypatch.setitem(attention.LIBRARIES, "broken", fail)
    assert attention._why_not("broken", DEVICE) == "NotImplementedError"


def test_photos_of_equal_length_are_computed_as_dense_batches(monkeypatch):
    """In a given number for each length; the others by the library of the choice."""
    monkeypatch.setattr(attention, "DENSE_TOKENS", 40)
    dense, compute = [], attention._dense
    monkeypatch.setattr(attention, "_dense", lambda x, n, scale: dense.append((len(x), n)) or compute(x, n, scale))
    lengths = [7] * 9 + [3, 5, 0, 50, 50, 50, 3, 3]
    ends = [0, *itertools.accumulate(lengths)]
    qkv = torch.randn(ends[-1], 3, 2, 32, generator=torch.Generator().manual_seed(0))
    output, rows = attention.attend(attention.Choice("attention_features", dense=True), qkv, ends, 0.2)
    assert rows is None and dense == [(28, 4), (28, 4), (100, 2)]
    torch.testing.assert_close(output, exact(qkv, ends, 0.2).float(), rtol=0, atol=1e-5)
    assert attention._parts(ends, dense=False) == [(0, 17, False)] and attention._parts([0], True) == [(0, 0, False)]


@pytest.mark.parametrize("library", ["torch SDPA", "attention_features"])
@pytest.mark.parametrize("fields", [("rows",), ("output", "rows")], ids=str)
def test_attention_weights_of_cls(library, fields):
    """Without the output, of the queries only those of CLS are used, and no values."""
    ends = [0, 65, 66, 66, 170]
    qkv = torch.randn(170, 3, 2, 64, generator=torch.Generator().manual_seed(0))
    exact_rows = [
        (0.2 * torch.einsum("hd,nhd->nh", qkv[begin, 0].double(), qkv[begin:end, 1].double())).softmax(0)
        for begin, end in itertools.pairwise(ends)
        if begin < end
    ]
    expected = exact(qkv, ends, 0.2).float()
    if "output" not in fields:
        qkv[[t for t in range(170) if t not in ends], 0] = torch.nan
        qkv[:, 2] = torch.nan
    output, rows = attention.attend(attention.Choice(library), qkv, ends, 0.2, fields)
    torch.testing.assert_close(rows, torch.cat(exact_rows).float(), rtol=0, atol=1e-6)
    assert (output is None) == ("output" not in fields)
    if output is not None:
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


CPU = torch.device("cpu")


def test_explain_names_the_measurement_and_the_libraries_that_cannot_run():
    kind = attention.device_class(CPU)
    text = attention.explain(CPU, torch.bfloat16)
    if (kind, torch.bfloat16) in attention.TABLE:
        fastest = attention.TABLE[kind, torch.bfloat16]
        assert text.startswith(f"attention in bfloat16 on {kind}: {fastest.library}, the fastest library")
        assert fastest.margin in text and "  torch SDPA: could run" in text
    assert "  xformers: runs on CUDA devices only" in text
    assert "  torch varlen_attn: runs on CUDA devices only" in text


def test_torch_is_the_default_without_a_measurement_or_if_the_fastest_library_cannot_run(monkeypatch):
    monkeypatch.setattr(attention, "TABLE", {})
    assert attention.choose(CPU, torch.float32) == attention.Choice("torch SDPA")
    assert "torch SDPA, the default" in attention.explain(CPU, torch.float32)
    fastest = attention.Fastest("xformers", "twice as fast")
    monkeypatch.setattr(attention, "TABLE", {(attention.device_class(CPU), torch.float32): fastest})
    assert attention.choose(CPU, torch.float32) == attention.Choice("torch SDPA")
    assert "torch SDPA, because the fastest library, xformers, cannot run" in attention.explain(CPU, torch.float32)


def test_table_has_existing_libraries_and_levels():
    for (kind, _), fastest in attention.TABLE.items():
        assert fastest.library in attention.LIBRARIES
        assert kind.split()[1] in ("avx2", "avx512", "avx512_vnni", "avx512_bf16") or kind.startswith("cuda sm_")


def test_device_classes():
    assert attention.device_class(CPU) == f"cpu {backends.native().level()}"
    assert attention.device_class(torch.device("meta")) == "meta"
