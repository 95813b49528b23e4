# SPDX-License-Identifier: MIT
import pytest
import torch

from namedmask import linear

CPU = torch.device("cpu")


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_both_libraries_compute_the_product(onednn, dtype, biased, gelu, monkeypatch):
    """With weights as they are, and with parameters, which oneDNN packs."""
    monkeypatch.setattr(linear, "rates", lambda: linear.Rates(True, onednn, 33, "a test"))
    layers = linear.Layers(CPU)
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((33, 72), (45, 2, 36), (45,)))
    expected = x.double() @ weight.flatten(1).double().T + (bias.double() if biased else 0)
    size = expected.abs().max()
    if gelu:
        expected = torch.nn.functional.gelu(expected)
    parameter = torch.nn.Parameter(weight, requires_grad=False)
    for w in (weight.flatten(1), parameter, parameter):
        result = layers(x, w, bias if biased else None, gelu)
        assert result.dtype == dtype and result.shape == (33, 45)
        assert (result - expected).abs().max() <= size * 4 * torch.finfo(dtype).eps
    assert list(layers.packed) == ([parameter] if onednn else [])


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


def test_a_torch_without_the_operators_multiplies_as_usual(monkeypatch):
    monkeypatch.setattr(linear, "rates", lambda: linear.Rates(True, True, 256, "a test"))
    assert linear.uses_onednn(CPU)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not linear.uses_onednn(CPU) and "by torch on" in linear.explain(CPU, torch.bfloat16)


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
