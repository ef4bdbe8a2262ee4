"""GPT-2: the network and its key-value cache.

Shapes: B batch, T new tokens, S keys attended to, C channels (n_embd), H heads, D channels of a
head, V vocabulary, L layers.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from config import GPT2Config

MAX_SCORES = 2**23  # most for which plain attention is used: backward keeps 6 bytes of each


class CausalSelfAttention(nn.Module):
    """Causal multi-head attention: each token attends to itself and earlier tokens."""

    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer

    def forward(self, x, mask=None, rotary=None, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv  # (B, H, T, D) each
        if rotary is not None:
            q, k = apply_rotary(qkv[:2], *rotary)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, H, S, D) each
        p = self.dropout if self.training else 0.0
        y = attention(q, k, v, mask, p)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C).to(qkv.dtype)
        return F.dropout(self.c_proj(y), p)


def attention(q, k, v, mask=None, dropout=0.0):
    """Scaled dot-product attention (B, H, T, D). In bf16 on a CPU, for T > 1 and at most
    MAX_SCORES scores (B, H, T, S), plain matmuls take half the fused kernel's time.
    """
    q, T = q.to(k.dtype), q.shape[2]  # a cache may be in float32
    n_scores = q[..., 0].numel() * k.shape[2]  # B * H * T * S
    if k.device.type == "cpu" and k.dtype == torch.bfloat16 and T > 1 and n_scores <= MAX_SCORES:
        return plain_attention(q, k, v, mask, dropout)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(k.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None and T > 1)


def plain_attention(q, k, v, mask=None, dropout=0.0):
    """Attention written out (Vaswani et al. 2017), with scores in at least float32."""
    (T, D), S = q.shape[2:], k.shape[2]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -math.inf)
    scores = torch.add(mask, q @ k.mT, alpha=1 / math.sqrt(D))  # mask + QK'/sqrt(D), (B, H, T, S)
    weights = F.softmax(scores, dim=-1).to(q.dtype)
    return F.dropout(weights, dropout) @ v


# ---------------------------------------------------------------- positions


def attention_mask(config, positions, S):
    """Bool mask (B or 1, 1, T, S), True where a token at positions (B or 1, T) may attend; with
    ALiBi a bias (B or 1, H, T, S) to add to the scores.
    """
    distance = positions[:, None, :, None] - torch.arange(S, device=positions.device)
    visible = distance >= 0
    if config.position != "alibi":
        return visible
    return alibi_bias(distance, config.n_head).masked_fill(~visible, -math.inf)


def alibi_bias(distance, n_head):
    """ALiBi (Press et al. 2022): a penalty (B or 1, H, T, S) linear in distance (.., 1, T, S)."""
    power = 2 ** math.floor(math.log2(n_head))
    head = torch.arange(n_head, device=distance.device)
    # slopes 2^(-8/n), 2^(-16/n) ... for n a power of two; further heads: every other slope of 2n
    exponent = torch.where(head < power, 8 * (head + 1), 4 * (2 * (head - power) + 1)) / power
    return -(2.0**-exponent)[:, None, None] * distance


def rotary_cos_sin(positions, head_size, dtype):
    """RoPE (Su et al. 2021) at positions (B or 1, T): cosines, signed sines, (B or 1, 1, T, D)."""
    dtype = torch.promote_types(dtype, torch.float32)  # bf16 is too rough for positions
    channels = torch.arange(0, head_size, 2, device=positions.device, dtype=dtype)
    angles = positions[:, None, :, None] * 10000.0 ** (-channels / head_size)  # (.., 1, T, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rotary(x, cos, sin):
    """Rotate channel pairs (i, i + D/2) of x (.., T, D): q.k then depends on the distance alone."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


# ---------------------------------------------------------------- the network


class MLP(nn.Module):
    """Two linear layers, 4x wide in between, with GPT-2's tanh form of GELU or the exact one."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.gelu = "tanh" if config.gelu == "tanh" else "none"  # torch's names

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate=self.gelu)  # (B, T, 4C)
        return self.dropout(self.c_proj(x))  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, rotary=None, cache=None):
        x = x + self.attn(self.ln_1(x), mask, rotary, cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT2(nn.Module):
    """GPT-2 (Radford et al. 2019), its parameters named as in the published weights."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        parts = self.transformer = nn.ModuleDict()
        parts["wte"] = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            parts["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        parts["drop"] = nn.Dropout(config.dropout)
        parts["h"] = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        parts["ln_f"] = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied (Press & Wolf 2017)
        residual_std = 0.02 / math.sqrt(2 * config.n_layer)  # for c_proj
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                std = residual_std if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(parameter, mean=0.0, std=std)

    def forward(self, idx, targets=None, cache=None, last=None):
        """Logits (B, T, V) and the loss (see cross_entropy), None without targets.

        idx, targets: int64 (B, T); with a cache, idx continues the cached tokens. last, int64 (B,),
        asks for one position of each row: (B, 1, V). ValueError beyond learned positions.
        """
        x = self.hidden(idx, cache)
        if last is not None:
            x = x[torch.arange(len(x), device=x.device), last][:, None]  # (B, 1, C)
        if torch.compiler.is_compiling() and x.is_cuda:  # V to a multiple of 64, for tensor cores
            V = self.config.vocab_size
            logits = F.linear(x, F.pad(self.lm_head.weight, (0, 0, 0, -V % 64)))[..., :V]
        else:
            logits = self.lm_head(x)
        if targets is None:
            return logits, None
        # detached: a compiled backward pass would materialize a zero gradient (B, T, V)
        return logits.detach(), cross_entropy(logits, targets)

    def hidden(self, idx, cache=None):
        """Final hidden states (B, T, C), after the last layer norm and before lm_head."""
        config, T, limit = self.config, idx.shape[1], context_limit(self.config)
        mask = rotary = None
        if cache is not None:
            positions, S, needs_mask = cache.advance(T)  # (B or 1, T)
        elif limit is None or T <= limit:
            positions, S, needs_mask = torch.arange(T, device=idx.device)[None], T, False
        else:
            raise ValueError(f"{T} tokens are more than block_size {limit}")
        if config.position == "alibi" or needs_mask:
            mask = attention_mask(config, positions, S)
        x = self.transformer.wte(idx)  # (B, T, C)
        if config.position == "learned":
            x = x + self.transformer.wpe(positions)
        elif config.position == "rope":
            rotary = rotary_cos_sin(positions, config.n_embd // config.n_head, x.dtype)
        x = self.transformer.drop(x)
        recompute = config.activation_checkpointing and self.training and torch.is_grad_enabled()
        for block in self.transformer.h:
            if recompute:
                x = checkpoint(block, x, mask, rotary, use_reentrant=False)
            else:
                x = block(x, mask, rotary, cache)
        return self.transformer.ln_f(x)

    def num_params(self) -> int:
        """Number of parameters; the tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> float:
        """Forward and backward FLOPs a token (Chowdhery et al. 2022, appendix B)."""
        config = self.config
        n = sum(p.numel() for name, p in self.named_parameters() if ".wpe." not in name)
        return 6 * n + 12 * config.n_layer * config.n_embd * config.block_size


def cross_entropy(logits, targets):
    """Mean loss in nats of logits (B, T, V) on targets, int64 (B, T); those of -1 are ignored."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


# ---------------------------------------------------------------- the cache


def context_limit(config: GPT2Config) -> int | None:
    """How many tokens the model can attend to; None: unlimited."""
    return config.block_size if config.position == "learned" else None


def context_start(length: int, limit: int | None) -> int:
    """First of `length` tokens that the model sees when it predicts the next one. Past the limit
    the context restarts at the last limit // 2 tokens and grows until full: sliding by one would
    mean recomputing the cache each time. With limit 8: 0 up to length 8, 5 for 9 to 13, 10 from 14.
    """
    if limit is None or length <= limit:
        return 0
    half = max(1, limit // 2)  # it restarts every limit - half + 1 tokens
    return length - half - (length - limit - 1) % (limit - half + 1)


class KVCache:
    """Keys and values of each row's current context; GPT2.forward fills it. Entries past a row's
    length are ignored and later overwritten: call set_lengths after right-padded prompts. Rows of
    unequal lengths need a mask; on a GPU its shape is fixed, so that a CUDA graph can replay it.
    """

    def __init__(self, config: GPT2Config, batch_size: int, capacity: int, device=None, dtype=None):
        B, H, D = batch_size, config.n_head, config.n_embd // config.n_head
        self.kv = torch.zeros(config.n_layer, 2, B, H, capacity, D, device=device, dtype=dtype)
        self.lengths = torch.zeros(B, dtype=torch.int64, device=device)
        self.common_length = 0  # every row's length, None if they may differ; on the host: no sync

    def set_lengths(self, lengths: list[int]):
        self.lengths.copy_(torch.tensor(lengths))
        self.common_length = lengths[0] if len(set(lengths)) == 1 else None

    def advance(self, T: int):
        """Reserve T positions a row, once before the layers' updates. Returns them (B or 1, T), the
        number of keys, and whether to mask: not an empty cache, nor one token in equal rows.
        """
        start, capacity = self.common_length, self.kv.shape[4]
        first = self.lengths[:, None] if start is None else start  # (B, 1), or a number
        self.positions = torch.arange(T, device=self.kv.device)[None] + first  # (B or 1, T)
        if start is not None:
            self.S = self.common_length = start + T
        else:
            self.S = int(self.positions.max()) + 1 if self.kv.is_cpu else capacity
        assert self.S <= capacity, f"{self.S} tokens in a cache for {capacity}"
        self.lengths += T
        return self.positions, self.S, start is None or (start > 0 and T > 1)

    def update(self, layer: int, k, v):
        """Store a layer's new K and V (B, H, T, D); return all K and V so far, (B, H, S, D)."""
        T, S = k.shape[2], self.S
        for kept, new in zip(self.kv[layer], (k.detach(), v.detach()), strict=True):
            if self.common_length is not None:
                kept[:, :, S - T : S] = new
            else:
                index = self.positions[:, None, :, None].expand_as(new)
                kept.scatter_(2, index, new.to(kept.dtype))
        return (k, v) if S == T else self.kv[layer, :, :, :, :S]
