"""The network against what is known of GPT-2, and the cache against the network without one."""

import math

import pytest
import torch
import torch.nn.functional as F

from config import GPT2_CONFIGS, GPT2Config, apply_preset
from model import GPT2, KVCache, context_start, cross_entropy, plain_attention

POSITIONS = ["learned", "rope", "alibi"]


def small(**values):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "block_size": 16, "n_layer": 3, "n_head": 4, "n_embd": 32}
    model = GPT2(GPT2Config(**(sizes | values))).double().eval()
    with torch.no_grad():  # far from the start, where all logits are near zero
        for parameter in model.parameters():
            parameter.mul_(5).add_(torch.randn_like(parameter) * 0.05)
    return model


def test_parameters_are_the_published_ones():
    names = "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"
    with torch.device("meta"):
        models = [GPT2(apply_preset(GPT2Config(), GPT2_CONFIGS[name], set())) for name in names]
    counts = [124_439_808, 354_823_168, 774_030_080, 1_557_611_200]
    assert [model.num_params() for model in models] == counts


@pytest.mark.parametrize("position", POSITIONS)
def test_flops_per_token_follow_palm_and_only_learned_positions_end(position):
    model, too_long = small(position=position), torch.zeros(1, 17, dtype=torch.int64)
    n = model.num_params() - (16 * 32 if position == "learned" else 0)
    assert model.flops_per_token() == 6 * n + 12 * 3 * 32 * 16
    if position == "learned":
        with pytest.raises(ValueError, match="17 tokens are more than block_size 16"):
            model(too_long)
    else:
        assert model(too_long)[0].shape == (1, 17, 50)
    cache = KVCache(model.config, 1, 16, dtype=torch.float64)
    with pytest.raises(AssertionError, match="17 tokens in a cache for 16"):
        model(too_long, cache=cache)


def test_initial_weights_have_gpt2s_spread_and_the_loss_is_ln_of_the_vocabulary():
    torch.manual_seed(1)
    model = GPT2(GPT2Config(vocab_size=500, block_size=64, n_layer=8, n_head=4, n_embd=128))
    block = model.transformer.h[3]
    assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)
    assert block.mlp.c_proj.bias.abs().max() == 0
    idx = torch.randint(500, (8, 33))
    _, loss = model(idx[:, :-1], idx[:, 1:])
    assert abs(loss.item() - math.log(500)) < 0.05


def test_targets_of_minus_one_do_not_count():
    model, idx = small(), torch.randint(50, (2, 16))
    targets = torch.randint(50, (2, 16))
    targets[:, ::2] = -1
    logits, loss = model(idx, targets)
    by_hand = F.cross_entropy(logits[:, 1::2].reshape(-1, 50), targets[:, 1::2].reshape(-1))
    assert loss.item() == pytest.approx(by_hand.item(), abs=1e-12)
    assert loss.requires_grad and not logits.requires_grad and model(idx)[0].requires_grad
    rough = logits.bfloat16()  # the loss of which is a float32 number all the same
    assert cross_entropy(rough, targets) == cross_entropy(rough.float(), targets)


def turned(x):
    """RoPE with pairs of channels as complex numbers (Su 2021): x (.., T, D)."""
    T, D = x.shape[-2:]
    pairs = torch.complex(x[..., : D // 2], x[..., D // 2 :])
    frequencies = 10000 ** (-2 * torch.arange(D // 2, dtype=torch.float64) / D)
    pairs = pairs * torch.exp(1j * torch.arange(T)[:, None] * frequencies)
    return torch.cat([pairs.real, pairs.imag], -1)


@pytest.mark.parametrize(
    "position, gelu, n_head",
    [("learned", "exact", 4), ("rope", "tanh", 4), ("alibi", "tanh", 4), ("alibi", "tanh", 6)],
)
def test_a_plain_version_written_out_gives_the_same_logits(position, gelu, n_head):
    """By the formulas of Radford 2019, Hendrycks & Gimpel 2016, Press 2022 (the slopes)."""
    D, model = 8, small(position=position, gelu=gelu, n_head=n_head, n_embd=8 * n_head)
    idx, w = torch.randint(50, (2, 9)), model.state_dict()
    slopes = [1 / 4, 1 / 16, 1 / 64, 1 / 256, 1 / 2, 1 / 8][:n_head]
    x = w["transformer.wte.weight"][idx]
    if position == "learned":
        x = x + w["transformer.wpe.weight"][:9]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    for name in (f"transformer.h.{layer}" for layer in range(3)):
        qkv = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn")
        q, k, v = qkv.view(2, 9, 3, n_head, D).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        if position == "rope":
            q, k = turned(q), turned(k)
        scores = q @ k.mT / math.sqrt(D)
        if position == "alibi":
            distance = torch.arange(9)[:, None] - torch.arange(9)
            scores -= torch.tensor(slopes)[:, None, None] * distance
        scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(y, f"{name}.attn.c_proj")
        u = linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        if gelu == "tanh":
            u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        else:
            u = 0.5 * u * (1 + torch.erf(u / math.sqrt(2)))
        x = x + linear(u, f"{name}.mlp.c_proj")
    expected = norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T
    assert (model(idx)[0] - expected).abs().max() < 1e-10
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = model.float()(idx)
    assert (rough - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("kind", ["causal", "bool", "number"])
def test_plain_attention_is_torchs(kind):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 20, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 4, 9, 9, dtype=torch.float64)
    mask = {"bool": (bias < 0.5) | torch.eye(9).bool(), "number": bias}.get(kind)
    ours = plain_attention(q, k, v, mask)
    theirs = F.scaled_dot_product_attention(q, k, v, mask, is_causal=kind == "causal")
    assert (ours - theirs).abs().max() < 1e-12
    dropped = plain_attention(q, k, torch.ones_like(v), mask, 0.25)
    assert dropped.mean().item() == pytest.approx(1, abs=0.1) and dropped.std() > 0.1


# ---------------------------------------------------------------- the cache


def test_context_grows_to_block_size_and_starts_again_from_half():
    for block_size in (1, 2, 3, 7, 16):
        half, seen = max(1, block_size // 2), 0
        for length in range(1, 5 * block_size + 3):
            seen = half if seen == block_size else seen + 1
            assert length - context_start(length, block_size) == seen


@pytest.mark.parametrize("position", POSITIONS)
def test_cached_logits_equal_uncached_in_pieces_of_any_size(position):
    model, idx = small(position=position), torch.randint(50, (3, 16))
    for pieces in ([1] * 16, [5, 8, 1, 2], [16]):
        cache = KVCache(model.config, 3, 16, dtype=torch.float64)
        parts = [model(part, cache=cache)[0] for part in idx.split(pieces, dim=1)]
        assert (torch.cat(parts, dim=1) - model(idx)[0]).abs().max() < 1e-10
        assert cache.lengths.tolist() == [16] * 3


@pytest.mark.parametrize("lengths", [[3, 9, 7], [6, 6, 6]])
@pytest.mark.parametrize("position", POSITIONS)
def test_rows_of_any_length_are_as_if_alone(position, lengths):
    """Whatever is in the places behind a row's length."""
    model = small(position=position)
    idx, cache = torch.randint(50, (3, 16)), KVCache(model.config, 3, 16, dtype=torch.float64)
    model(idx[:, :9], cache=cache)
    cache.set_lengths(lengths)
    for t in range(7):
        token = torch.stack([idx[row, n + t : n + t + 1] for row, n in enumerate(lengths)])
        logits, _ = model(token, cache=cache)
        for row, n in enumerate(lengths):
            expected, _ = model(idx[row : row + 1, : n + t + 1])
            assert (logits[row, -1] - expected[0, -1]).abs().max() < 1e-10


@pytest.mark.parametrize("position", POSITIONS)
def test_activation_checkpointing_changes_no_gradient(position):
    def gradients(recompute):
        model = small(position=position, dropout=0.1, activation_checkpointing=recompute).train()
        torch.manual_seed(1)
        idx = torch.randint(50, (2, 16))
        model(idx, idx.roll(-1, 1))[1].backward()
        return [parameter.grad for parameter in model.parameters()]

    pairs = zip(gradients(False), gradients(True), strict=True)
    assert all(torch.equal(plain, recomputed) for plain, recomputed in pairs)
