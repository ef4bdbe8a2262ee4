"""Weights for generating on a CPU: the numbers are those of the plain layers, but for rounding."""

import copy
import time

import pytest
import torch

import quantize
from config import GPT2Config
from model import GPT2, KVCache
from sampling import Sampling, generate_ids, prefill


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT2(GPT2Config(40, block_size=16, n_layer=2, n_head=2, n_embd=32)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(torch.randn_like(parameter) * 0.05)
        model.lm_head.weight[7] = 0  # a row without a range
    threads = torch.get_num_threads()
    yield model
    torch.set_num_threads(threads)


def count(model, kind):
    return sum(isinstance(layer, kind) for layer in model.modules())


@pytest.mark.filterwarnings("error")
def test_int8_weights_predict_as_float32_does(model):
    plain = copy.deepcopy(model)
    quantize.to_int8(model)
    assert count(model, quantize.Int8Linear) == 2 * 4 + 1  # the head too
    assert count(model, torch.nn.Linear) == 0
    x, y = torch.randint(40, (2, 8, 16))
    with torch.inference_mode():
        (logits, loss), (expected, expected_loss) = model(x, y), plain(x, y)
    assert (logits - expected).norm() < 0.05 * expected.norm()
    assert abs(loss / expected_loss - 1) < 0.01
    with pytest.raises(ValueError, match="--dtype int8: for a CPU, not meta"):
        quantize.to_int8(plain.to("meta"))


def test_packed_weights_multiply_as_before(model):
    plain = copy.deepcopy(model).bfloat16()
    packed = copy.deepcopy(plain)
    quantize.pack_linears(packed, 3)
    if count(packed, torch.nn.Linear):
        pytest.skip("no oneDNN for bfloat16 on this CPU")
    assert count(packed, quantize.PackedLinear) == 2 * 4 + 1
    quantize.pack_linears(model, 3)  # float32
    quantize.pack_linears(plain, 1)  # one row
    assert count(model, quantize.PackedLinear) == count(plain, quantize.PackedLinear) == 0
    with torch.inference_mode():
        for prompts in ([[1], [2], [3]], [[1, 2, 3, 4]]):
            logits, expected = prefill(packed, prompts), prefill(plain, prompts)
            assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
    for quick in (packed, quantize.to_int8(model)):
        assert len(list(generate_ids(quick, [[1], [2, 3], [4]], Sampling(30, 0.9)))) == 30


@pytest.mark.parametrize("slow, chosen", [(2, 1), (1, 2)])
def test_decoding_takes_as_many_threads_as_are_fastest(model, slow, chosen):
    used = []

    def decode(idx):
        used.append(torch.get_num_threads())
        time.sleep(0.01 * (used[-1] == slow))

    torch.set_num_threads(2)
    timed = quantize.with_best_threads(quantize.to_int8(model), decode)
    for _ in range(80):
        timed(None)
    trial = [2, 2, 1, 1]
    assert used == trial + [chosen] * 60 + trial + [chosen] * 12 and torch.get_num_threads() == 2


@pytest.mark.parametrize("make", [quantize.to_int8, torch.nn.Module.bfloat16])
def test_the_number_of_threads_changes_no_number(model, make):
    model, found = make(model), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        cache = KVCache(model.config, 2, 16)
        with torch.inference_mode():
            found.append([model(torch.full((2, 1), i), cache=cache)[0] for i in range(16)])
    assert all(map(torch.equal, *found))
