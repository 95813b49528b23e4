# SPDX-License-Identifier: MIT
import pytest
import torch

from namedmask import linear

CPU = torch.device("cpu")


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_both_libraries_compute_the_product(onednn, dtype, biased, monkeypatch):
    monkeypatch.setattr(linear, "rates", lambda: linear.Rates(True, onednn, "a test"))
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((33, 70), (45, 70), (45,)))
    expected = x.double() @ weight.double().T + (bias.double() if biased else 0)
    result = linear.linear(x, weight, bias if biased else None)
    assert result.dtype == dtype and result.shape == (33, 45)
    assert (result - expected).abs().max() <= expected.abs().max() * 4 * torch.finfo(dtype).eps


def test_the_choice_follows_the_table(monkeypatch):
    for kind, row in linear.TABLE.items():
        monkeypatch.setattr(linear, "processor", lambda kind=kind: kind)
        assert linear.choose(CPU, torch.float32) == torch.float32
        assert linear.choose(CPU, torch.bfloat16) == (torch.bfloat16 if row.bfloat16 else torch.float32)
        assert linear.uses_onednn(CPU) == row.onednn
        assert linear.explain(CPU, torch.bfloat16) == (
            f"linear layers in {'bfloat16' if row.bfloat16 else 'float32'} by {'oneDNN' if row.onednn else 'torch'} "
            f"on {kind}: {row.margin}"
        )


def test_a_processor_that_was_not_measured_computes_as_torch_does_in_float32(monkeypatch):
    monkeypatch.setattr(linear, "processor", lambda: "CentaurHauls no bfloat16")
    assert linear.choose(CPU, torch.bfloat16) == torch.float32 and not linear.uses_onednn(CPU)


def test_gpus_are_left_to_torch():
    gpu = torch.device("cuda")
    assert linear.choose(gpu, torch.bfloat16) == torch.bfloat16 and not linear.uses_onednn(gpu)


def test_the_processor_is_named_by_vendor_and_instructions(monkeypatch):
    linear.processor.cache_clear()
    text = "flags : x\nvendor_id\t: AuthenticAMD\nmodel : 17\n"
    monkeypatch.setattr(linear.Path, "read_text", lambda self, **_: text)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert linear.processor() == "AuthenticAMD avx512_bf16" and linear.processor() in linear.TABLE
    linear.processor.cache_clear()
