"""Updates against plain versions of the same formulas."""

import copy
import math

import pytest
import torch
from conftest import same

from config import GPT2Config, derived
from model import GPT2
from optim import learning_rate, make_optimizer, orthogonalize, parameter_groups
from parallel import full_state


def model():
    torch.manual_seed(0)
    return GPT2(GPT2Config(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=32))


def test_learning_rate_warms_up_and_decays():
    config = derived(GPT2Config(max_iters=100, learning_rate=1.0, min_lr=0.1, warmup_iters=10))
    rates = [learning_rate(step, config) for step in range(120)]
    assert rates[0] == pytest.approx(1 / 11) and rates[10] == 1.0
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.55) and rates[100] == rates[119] == 0.1
    config.lr_schedule = "linear"
    assert learning_rate(10 + 30, config) == pytest.approx(1 - 0.9 * 30 / 90)
    for values in ({"max_iters": 0}, {"max_iters": 1}, {"warmup_iters": 5, "lr_decay_iters": 5}):
        config = derived(GPT2Config(**values))
        assert all(math.isfinite(learning_rate(step, config)) for step in range(10))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_groups_hold_every_parameter_once_and_decay_matrices_only(optimizer):
    net = model()
    groups = parameter_groups(net, derived(GPT2Config(optimizer=optimizer)))
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted({id(p) for p in net.parameters()})
    for group in groups:
        assert all((p.ndim == 2) == (group["weight_decay"] > 0) for p in group["params"])
        if group["muon"]:
            assert len(group["params"]) == 2 * 4
            assert net.transformer.wte.weight not in set(group["params"])


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 128, 32), (2, 32, 96)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, dtype=torch.float64)))
    assert values.min() > 0.3 and values.max() < 1.3


def test_muon_equals_a_plain_version():
    """Momentum, Nesterov, each matrix orthogonalized alone, decay: Jordan 2024, Liu 2025."""
    config = GPT2Config(optimizer="muon", learning_rate=0.01, weight_decay=0.2, beta1=0.95)
    net = model().double()
    optimizer = make_optimizer(net, derived(config))
    name = "transformer.h.1.attn.c_attn.weight"
    weight = dict(net.named_parameters())[name]
    expected, momentum = weight.detach().clone(), torch.zeros_like(weight)
    for step in range(4):
        torch.manual_seed(step)
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        grad = weight.grad.clone()
        if step > 1:  # as on CUDA, where it is always there, in float32
            optimizer.found_inf = torch.zeros(())
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * grad
        update = 0.05 * grad + 0.95 * momentum
        parts = [orthogonalize(part[None])[0] for part in update.chunk(3)]
        expected = expected * (1 - 0.01 * 0.2) - 0.01 * 0.2 * math.sqrt(32) * torch.cat(parts)
    assert (weight - expected).abs().max() < 1e-12


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_changes_everything_and_with_found_inf_nothing(optimizer):
    net = model()
    optimizer = make_optimizer(net, derived(GPT2Config(optimizer=optimizer)))
    assert full_state(net, optimizer)[1] == {} and not optimizer.state  # before the first step
    for grad, found_inf in ((1.0, 0.0), (math.nan, 1.0), (2.0, 0.0)):
        before = copy.deepcopy(full_state(net, optimizer))
        for p in net.parameters():
            p.grad = torch.full_like(p, grad)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        assert same(full_state(net, optimizer), before) == bool(found_inf)
    weights, state = full_state(net, optimizer)
    assert state.keys() == dict(net.named_parameters()).keys()
    assert all(weight.isfinite().all() for weight in weights.values())
