"""Weights for generating on a CPU: the numbers are those of the plain layers, but for rounding."""

import copy

import pytest
import torch

import quantize
from config import GPT2Config
from model import GPT2
from sampling import Sampling, generate_ids, prefill


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 40}
    model = GPT2(GPT2Config(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(torch.randn_like(parameter) * 0.05)
    return model


def layers_of(model, kind):
    return [layer for layer in model.modules() if isinstance(layer, kind)]


def test_rows_are_rounded_by_at_most_half_a_scale():
    weight = torch.randn(50, 30)
    weight[7] = 0
    rounded, scale = quantize.quantize_rows(weight)
    assert rounded.dtype == torch.int8 and rounded[0].abs().max() == 127
    error = (rounded * scale[:, None].double() - weight).abs()
    assert (error <= scale[:, None] * 0.5001).all() and not rounded[7].any()


@pytest.mark.filterwarnings("error")
def test_int8_weights_predict_as_float32_does(model):
    plain = copy.deepcopy(model)
    quantize.to_int8(model)
    assert len(layers_of(model, quantize.Int8Linear)) == 2 * 4 + 1  # the head too
    assert not layers_of(model, torch.nn.Linear)
    idx = torch.randint(40, (8, 17))
    with torch.inference_mode():
        logits, loss = model(idx[:, :-1], idx[:, 1:])
        expected, expected_loss = plain(idx[:, :-1], idx[:, 1:])
    assert (logits - expected).norm() < 0.05 * expected.norm()
    assert abs(loss / expected_loss - 1) < 0.01
    assert len(list(generate_ids(model, [[1], [2, 3]], Sampling(30)))) == 30


def test_int8_is_for_a_cpu():
    with torch.device("meta"):
        model = GPT2(GPT2Config(n_layer=1))
    with pytest.raises(ValueError, match="--dtype int8: for a CPU, not meta"):
        quantize.to_int8(model)


def test_packed_weights_multiply_as_before(model):
    plain = copy.deepcopy(model).bfloat16()
    packed = copy.deepcopy(plain)
    quantize.pack_linears(packed, 3)
    found = layers_of(packed, quantize.PackedLinear)
    if not found:
        pytest.skip("no oneDNN for bfloat16 on this CPU")
    assert len(found) == 2 * 4 + 1
    for other, rows in ((model, 3), (plain, 1)):  # float32; one row
        quantize.pack_linears(other, rows)
        assert type(other.lm_head) is torch.nn.Linear
    with torch.inference_mode():
        for prompts in ([[1], [2], [3]], [[1, 2, 3, 4]]):
            logits, expected = prefill(packed, prompts), prefill(plain, prompts)
            assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
    assert len(list(generate_ids(packed, [[1], [2, 3], [4]], Sampling(30, 0.9)))) == 30
