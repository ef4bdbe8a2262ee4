"""GPT-2: the network and its key-value cache.

Shapes: B batch, T time (new tokens), S tokens seen so far, C channels (n_embd), H heads,
D channels of a head, V vocabulary, L layers.

    from config import GPT2Config
    from model import GPT2
    logits, loss = GPT2(GPT2Config())(idx, targets)
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import GPT2Config

# While it is multiplied, the output matrix gets rows up to a multiple of this, which tensor cores
# want: 50,304 instead of 50,257.
PADDING = {"cuda": 64}
MOST_SCORES = 2**23  # a layer of plain attention keeps 6 bytes of each for going backward
FEW = 256  # tokens for which copying the matrix would cost more than it brings


class CausalSelfAttention(nn.Module):
    """Each position looks at itself and at what came before, n_head ways at once."""

    def __init__(self, config, layer):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer

    def forward(self, x, mask=None, angles=None, cache=None):
        B, T, C = x.shape
        qk, v = self.c_attn(x).split([2 * C, C], dim=2)  # (B, T, 2C), (B, T, C)
        qk = qk.view(B, T, 2 * self.n_head, -1).transpose(1, 2)  # (B, 2H, T, D)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
        if angles is not None:
            qk = rotate(qk, angles)
        q, k = qk.chunk(2, dim=1)  # (B, H, T, D) each
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, S, D) each
        p = self.dropout if self.training else 0.0
        y = attention(q, k, v, mask, p, causal=mask is None and T > 1)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), p)


def attention(q, k, v, mask, dropout, causal):
    """Scaled dot-product attention, in the way that is fastest for it: (B, H, T, D).

    mask: None, or what broadcasts to (B, H, T, S): True where a token may look, or a number to add.
    A CPU's fused kernel saves memory, not time. In bf16 plain products take half of it, as long as
    the scores (B, H, T, S) are few; a single token that looks far back at a cache in float32 gains
    a fifth.
    """
    if torch.is_autocast_enabled(q.device.type):
        with torch.autocast(q.device.type, enabled=False):
            return attention(q, k, v, mask, dropout, causal)
    dtype, T, S = q.dtype, q.shape[2], k.shape[2]
    if q.device.type == "cpu" and dtype == torch.bfloat16:
        few = MOST_SCORES if mask is None else 2 * MOST_SCORES  # the fused kernel dislikes masks
        if T > 1 and q[..., 0].numel() * S <= few:
            return plain_attention(q, k.to(dtype), v.to(dtype), mask, dropout, causal)
        if T == 1 and mask is None and S > 256 and k.dtype == torch.float32:
            return plain_attention(q.float(), k, v, None, dropout, False).to(dtype)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(k.dtype)
    y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, mask, dropout, is_causal=causal)
    return y.to(dtype)


def plain_attention(q, k, v, mask, dropout, causal):
    """attention by its formula (Vaswani et al. 2017)."""
    wide, scale = torch.promote_types(q.dtype, torch.float32), 1 / math.sqrt(q.shape[-1])
    if causal:
        mask = q.new_full((q.shape[2], k.shape[2]), -math.inf, dtype=wide).triu_(1)  # (T, S)
    elif mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=wide).masked_fill_(~mask, -math.inf)
    if mask is None:
        scores = (k @ (q * scale).mT).mT  # (B, H, T, S)
    else:
        scores = torch.add(mask, q @ k.mT, alpha=scale)
    weights = F.softmax(scores, dim=-1).to(q.dtype)
    return F.dropout(weights, dropout) @ v


# ---------------------------------------------------------------- positions


def rotary_angles(positions, head_size, dtype):
    """Cosines and signed sines (..., T, D) with which `rotate` turns pairs of channels of tokens
    at positions (..., T): RoPE (Su et al. 2021).
    """
    dtype = torch.promote_types(dtype, torch.float32)
    channels = torch.arange(0, head_size, 2, device=positions.device, dtype=dtype)
    angles = positions[..., None] * 10000.0 ** (-channels / head_size)  # (..., T, D/2)
    if angles.ndim == 3:  # rows with positions of their own
        angles = angles[:, None]  # (B, 1, T, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x, angles):
    """x (B, any, T, D), channels i and i + D/2 turned together by an angle that grows with the
    position, so that the product of a query and a key depends on their distance alone.
    """
    cos, sin = angles
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


def distance_penalty(positions, seen, n_head):
    """ALiBi (Press et al. 2022) as a mask (1 or B, H, T, S): a token at positions (..., T) sees the
    `seen` first ones, each the less the farther back it is; a slope for each head.
    """
    device, power = positions.device, 2 ** math.floor(math.log2(n_head))
    head = torch.arange(n_head, device=device)
    # 2^(-8/n), 2^(-16/n) ... for n a power of two; else every second of those for twice as many
    exponent = torch.where(head < power, 8 * (head + 1), 4 * (2 * (head - power) + 1)) / power
    slope = 2.0**-exponent  # (H,)
    distance = positions[..., None] - torch.arange(seen, device=device)  # (..., T, S)
    distance = distance.view(-1, 1, *distance.shape[-2:])  # (1 or B, 1, T, S)
    penalty = -slope.view(1, -1, 1, 1) * distance  # (1 or B, H, T, S)
    return penalty.masked_fill(distance < 0, -math.inf)


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

    def forward(self, x, mask=None, angles=None, cache=None):
        x = x + self.attn(self.ln_1(x), mask, angles, cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT2(nn.Module):
    """GPT-2 (Radford et al. 2019) under the published weights' parameter names.

    With position "rope" or "alibi" there is no table of positions, and no end to the context.
    """

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        parts = {"wte": nn.Embedding(config.vocab_size, config.n_embd)}
        if config.position == "learned":
            parts["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        parts["drop"] = nn.Dropout(config.dropout)
        parts["h"] = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        parts["ln_f"] = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied (Press & Wolf 2017)
        self._init_weights()

    def _init_weights(self):
        """N(0, 0.02); smaller for the two projections of a block into the residual stream."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                std = residual_std if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(parameter, mean=0.0, std=std)

    def forward(self, idx, targets=None, cache=None, at=None):
        """Logits (B, T, V) and the loss: mean cross-entropy in nats over targets that are not -1.

        idx and targets are int64 (B, T). at, int64 (B,), asks for the logits of one token of each
        row alone: (B, 1, V). With a cache, idx are the tokens that follow those in it;
        the cache takes them up. Raises ValueError where T > block_size, positions are learned and
        there is no cache.
        """
        T, limit = idx.shape[1], context_limit(self.config)
        mask = None
        if cache is None:
            if limit is not None and T > limit:
                raise ValueError(f"{T} tokens are more than block_size {limit}")
            positions = torch.arange(T, device=idx.device)  # (T,)
        elif cache.has_room(T):
            positions, mask = cache.begin(idx)  # (T,), or (B, T) where rows differ in length
        else:
            return self._slide(idx, cache), None
        x, mask, angles = self.embed(idx, positions, mask, T if cache is None else cache.seen)
        for block in self.transformer.h:
            x = block(x, mask, angles, cache)
        if cache is not None:
            cache.end()
        if at is not None:
            x = x[torch.arange(len(x), device=x.device), at][:, None]  # (B, 1, C)
        logits = self.logits(self.transformer.ln_f(x))  # (B, T, V)
        return logits, None if targets is None else cross_entropy(logits, targets)

    def embed(self, idx, positions, mask, seen):
        """What enters the blocks, (B, T, C); and what tells them positions: mask and angles."""
        config, angles = self.config, None
        x = self.transformer.wte(idx)  # (B, T, C)
        if config.position == "learned":
            x = x + self.transformer.wpe(positions)
        elif config.position == "rope":
            angles = rotary_angles(positions, config.n_embd // config.n_head, x.dtype)
        else:
            mask = distance_penalty(positions, seen, config.n_head)
        return self.transformer.drop(x), mask, angles

    def logits(self, x):
        """(B, T, V) from (B, T, C); rows added to the output matrix for speed are cut off again."""
        V, multiple = self.config.vocab_size, PADDING.get(x.device.type, 1)
        if V % multiple == 0 or x[..., 0].numel() < FEW:
            return self.lm_head(x)
        weight = F.pad(self.lm_head.weight, (0, 0, 0, -V % multiple))
        return F.linear(x, weight)[..., :V]

    def _slide(self, idx, cache):
        """Logits for tokens that do not fit: a full row starts again from its last half.

        Token by token, because each row slides at its own time.
        """
        logits = []
        cache.make_room(cache.block_size)
        for token in idx.split(1, dim=1):  # (B, 1)
            full = [row for row, length in enumerate(cache.lengths) if length == cache.block_size]
            rest = [row for row in range(len(cache.lengths)) if row not in full]
            out = token.new_empty(token.shape[0], 1, self.config.vocab_size, dtype=cache.kv.dtype)
            for rows, start_again in ((full, True), (rest, False)):
                if rows:
                    part = cache.rows(rows, start_again)
                    new = torch.cat([part.kept, token[rows]], dim=1)  # (rows, half) or (rows, 1)
                    out[rows] = self(new, cache=part)[0][:, -1:].to(out.dtype)
                    cache.put(rows, part)
            logits.append(out)
        return torch.cat(logits, dim=1)  # (B, T, V)

    def num_params(self) -> int:
        """How many numbers are learned; the tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> float:
        """Forward and backward FLOPs a token (Chowdhery et al. 2022, appendix B)."""
        config = self.config
        n = self.num_params()
        if config.position == "learned":
            n -= self.transformer.wpe.weight.numel()
        return 6 * n + 12 * config.n_layer * config.n_embd * config.block_size


def cross_entropy(logits, targets):
    """Mean cross-entropy in nats, in at least float32; targets of -1 do not count.

    logits (B, T, V), targets int64 (B, T). Many logits go through CrossEntropy, but for a compiled
    model, whose kernels need no help.
    """
    logits, targets = logits.flatten(0, 1), targets.flatten()  # (B * T, V), (B * T,)
    if logits.numel() > logits_at_once(logits.device.type) and not torch.compiler.is_compiling():
        return CrossEntropy.apply(logits, targets)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.cross_entropy(logits, targets, ignore_index=-1)


class CrossEntropy(torch.autograd.Function):
    """The same, some rows at a time: beside the logits there is only their gradient, in their own
    dtype, where the whole table at once would take three more in float32.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        wide, rows = torch.promote_types(logits.dtype, torch.float32), rows_at_once(logits)
        ctx.save_for_backward(logits, targets)
        losses = [
            F.cross_entropy(part.to(wide), target, ignore_index=-1, reduction="sum")
            for part, target in zip(logits.split(rows), targets.split(rows), strict=True)
        ]
        return torch.stack(losses).sum() / (targets != -1).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """A logit's derivative: its probability, less 1 for the target's."""
        logits, targets = ctx.saved_tensors
        counts, words = targets != -1, targets.clamp(min=0)[:, None]  # (N,), (N, 1), N = B * T
        scales = (grad / counts.sum()).where(counts, 0)[:, None]  # (N, 1)
        out, rows = torch.empty_like(logits), rows_at_once(logits)
        tables = (out, logits, words, scales)
        for out_part, part, word, scale in zip(*(t.split(rows) for t in tables), strict=True):
            slopes = part.softmax(1, dtype=grad.dtype)
            slopes.scatter_(1, word, slopes.gather(1, word) - 1)
            out_part.copy_(slopes.mul_(scale))
        return out, None


def rows_at_once(logits):
    return max(1, logits_at_once(logits.device.type) // logits.shape[1])


def logits_at_once(device_type: str) -> int:
    """A CPU's cache holds so many in float32; a GPU would rather have fewer and larger kernels."""
    return 2**20 if device_type == "cpu" else 2**24


# ---------------------------------------------------------------- the cache


def context_limit(config: GPT2Config) -> int | None:
    """How many tokens the model can look at; None: all, however many."""
    return config.block_size if config.position == "learned" else None


def context_start(length: int, limit: int | None) -> int:
    """First of `length` tokens that the model still sees when it predicts the next one.

    Up to the limit all are seen. Beyond, only the last limit // 2 are kept, and the context grows
    from there until it is full again: filling it anew at every token would cost as much as having
    no cache. Cached and uncached generation both follow this rule.
    """
    if limit is None or length <= limit:
        return 0
    half = max(1, limit // 2)
    return length - half - (length - limit - 1) % (limit - half + 1)


FIRST_ROOM = 128  # tokens; clearing room for all of block_size takes as long as several steps


class KVCache:
    """Keys and values of the tokens seen so far, passed to GPT2.forward, which fills it.

    Each row has its own length, so that prompts of unequal length, padded on the right, go through
    together: after the padded prompts call `truncate` with their true lengths.
    """

    def __init__(self, config: GPT2Config, batch_size: int, device=None, dtype=None):
        self.config, self.block_size = config, config.block_size
        self.limit = context_limit(config)
        head_size = config.n_embd // config.n_head
        room = min(config.block_size, FIRST_ROOM)
        shape = (config.n_layer, 2, batch_size, config.n_head, room, head_size)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)  # (L, 2, B, H, room, D)
        self.idx = torch.zeros(batch_size, room, dtype=torch.int64, device=device)
        self.kept = None  # tokens with which a row that was full starts again
        self.lengths = [0] * batch_size  # on the host: reading them never waits for the device
        self.positions = None  # see hold_still

    def hold_still(self):
        """From now on a step of one token has the same shapes at every length, as a CUDA graph
        needs: lengths are kept on the device too, and all the room is looked at, under a mask.
        """
        self.make_room(self.block_size)
        self.positions = torch.tensor(self.lengths, device=self.idx.device)[:, None]  # (B, 1)

    def has_room(self, tokens: int) -> bool:
        return self.limit is None or max(self.lengths) + tokens <= self.limit

    def truncate(self, lengths: list[int]):
        """Forget what each row holds beyond its length: the padding of shorter prompts."""
        assert all(0 <= new <= old for new, old in zip(lengths, self.lengths, strict=True))
        self.lengths = list(lengths)
        self._tell_device()

    def _tell_device(self):
        if self.positions is not None:
            self.positions.copy_(torch.tensor(self.lengths)[:, None])

    def begin(self, idx):
        """Make room for idx (B, T). Their positions (T,), or (B, T) where rows differ in length,
        and the mask (1 or B, 1, T, S) where the one for tokens that come first would not do.
        """
        T, device = idx.shape[1], idx.device
        first, still = self.lengths[0], self.positions is not None and T == 1
        self.new, self.seen = T, max(self.lengths) + T
        self.ragged = still or any(length != first for length in self.lengths)
        self.make_room(self.seen)
        if still:
            self.seen, positions = self.idx.shape[1], self.positions  # (B, 1)
        elif self.ragged:
            starts = torch.tensor(self.lengths, device=device)
            positions = starts[:, None] + torch.arange(T, device=device)  # (B, T)
        else:
            positions = torch.arange(first, first + T, device=device)  # (T,)
        self._positions, mask = positions, None
        if self.ragged:
            self._rows = torch.arange(len(self.lengths), device=device)[:, None]  # (B, 1)
            self.idx[self._rows, positions] = idx
        else:
            self.idx[:, first : first + T] = idx
        if self.ragged or (first > 0 and T > 1):
            seen = torch.arange(self.seen, device=device)  # (S,)
            mask = (seen <= positions[..., None]).view(-1, 1, T, self.seen)
        return positions, mask

    def make_room(self, tokens):
        """Room for so many; it doubles, so that each token is moved about once."""
        room = self.idx.shape[1]
        if tokens > room:
            most = max(2 * room, tokens)
            more = (most if self.limit is None else min(most, self.limit)) - room
            self.kv = F.pad(self.kv, (0, 0, 0, more))
            self.idx = F.pad(self.idx, (0, more))

    def append(self, layer, k, v):
        """Take up a layer's new keys and values (B, H, T, D); give all, (B, H, S, D) each."""
        keys, values = self.kv[layer]  # (B, H, room, D) each
        k, v = k.detach(), v.detach()  # a cache is for generating: no gradient flows through it
        if self.ragged:
            keys[self._rows, :, self._positions] = k.transpose(1, 2).to(keys.dtype)
            values[self._rows, :, self._positions] = v.transpose(1, 2).to(values.dtype)
        else:
            start = self.seen - self.new
            keys[:, :, start : self.seen] = k
            values[:, :, start : self.seen] = v
        return keys[:, :, : self.seen], values[:, :, : self.seen]

    def end(self):
        """All layers have taken up the new tokens."""
        self.lengths = [length + self.new for length in self.lengths]
        if self.positions is not None:
            self.positions += self.new

    def rows(self, rows: list[int], start_again: bool) -> "KVCache":
        """A cache of some rows: as they are, or empty with the tokens to start again from."""
        part = object.__new__(KVCache)
        part.config, part.block_size, part.limit = self.config, self.block_size, self.limit
        part.kv, part.idx = self.kv[:, :, rows], self.idx[rows]  # copies
        half = max(1, self.block_size // 2)
        first = self.block_size + 1 - half if start_again else self.block_size
        part.kept = part.idx[:, first:]
        part.positions = None
        part.lengths = [0 if start_again else self.lengths[row] for row in rows]
        return part

    def put(self, rows: list[int], part: "KVCache"):
        """Take back rows that went through the model on their own."""
        self.kv[:, :, rows], self.idx[rows] = part.kv, part.idx
        for row, length in zip(rows, part.lengths, strict=True):
            self.lengths[row] = length
        self._tell_device()
