"""From logits to tokens, from tokens to text.

    from sampling import sample_text
    print(sample_text(model, tokenizer, "To be", max_new_tokens=50, temperature=0.7))

Shapes: B rows (one per (prompt, sample)), V vocabulary, K candidates.
"""

import time
from dataclasses import dataclass
from itertools import chain
from typing import Annotated

import torch
from pydantic import Field

from config import dtype_name
from logger import warn, world_size
from model import KVCache, context_limit, context_start
from options import integer, number, validate
from quantize import with_best_threads
from tokenizer import StreamDecoder
from utils import derived_seed


@dataclass
class Sampling:
    # how tokens are drawn
    max_new_tokens: integer(0) = 200  # tokens to add to the prompt
    temperature: number(0) = 0.8  # below 1 safer, above 1 wilder, 0 always the most likely token
    top_k: integer(1) | None = 200  # choose among the k most likely tokens
    top_p: number(above=0, most=1) | None = None  # choose among the likeliest that add up to this
    stop: Annotated[str, Field(min_length=1)] | None = None  # end before this text
    num_samples: integer(1) = 1  # texts for each prompt
    seed: integer(0) = 1337  # the same seed gives the same text


def sample(logits, uniform, sampling):
    """Token ids (B,) from logits (B, V) and a number in [0, 1) for each row (B,)."""
    p, ids = logits_to_probs(logits, sampling)  # (B, K) each
    return ids.gather(1, inverse_cdf(p, uniform)[:, None])[:, 0]  # (B,)


def logits_to_probs(logits, sampling):
    """Probabilities, descending, and the ids of their tokens: (B, K) each, from logits (B, V).
    top_p keeps the fewest that add up to it (Holtzman et al. 2020); the others get 0.
    """
    if sampling.temperature < 1e-6:  # greedy
        ids = logits.argmax(dim=-1, keepdim=True)
        return torch.ones(ids.shape, device=ids.device), ids
    if sampling.top_k is None or sampling.top_k >= logits.shape[-1]:
        logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    else:
        logits, ids = logits.topk(sampling.top_k, dim=-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits - logits[:, :1]  # shift so the max is 0: no overflow at low temperature
    p = torch.softmax(logits / sampling.temperature, dim=-1)  # (B, K)
    if sampling.top_p is not None and sampling.top_p < 1:  # at 1, rounding could drop the last
        before = p.cumsum(dim=-1) - p  # cumulative probability of more likely tokens
        p = torch.where(before < sampling.top_p, p, 0)
    return p, ids


def inverse_cdf(p, uniform):
    """Index (B,) where the cumulative sum of p (B, K) exceeds uniform (B,) * total; as p is sorted,
    CPU and GPU pick the same token apart from ties.
    """
    cdf = p.cumsum(dim=-1)  # (B, K)
    target = uniform[:, None].to(p.dtype) * cdf[:, -1:]  # (B, 1)
    return ((cdf[:, :-1] <= target) & (p[:, 1:] > 0)).sum(dim=-1)


def uniform_numbers(seed, samples, device):
    """Endlessly yield numbers in [0, 1), (B,); a row's depend on seed and sample number alone."""
    generators = [torch.Generator().manual_seed(derived_seed(seed, n)) for n in samples]
    while True:
        block = torch.stack([torch.rand(256, generator=g) for g in generators], dim=1)  # (256, B)
        yield from block.to(device)


# ---------------------------------------------------------------- tokens


@torch.inference_mode()
def generate_ids(model, prompts, sampling, samples=None, use_cache=True):
    """Yield each row's new id, max_new_tokens times. prompts: B lists of ids, none empty; samples:
    each row's sample number. Without the cache the text is the same, even past block_size.
    """
    tokens = [list(prompt) for prompt in prompts]
    limit, device = context_limit(model.config), next(model.parameters()).device
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would make a plan for each new length
    uniform = uniform_numbers(sampling.seed, samples or [0] * len(tokens), device)
    starts = [None] * len(tokens)
    new = decode = None
    longest = max(map(len, tokens)) + sampling.max_new_tokens - 1
    cache = new_cache(model, len(tokens), min(longest, limit or longest)) if use_cache else None
    for step in range(sampling.max_new_tokens):
        old_starts, starts = starts, [context_start(len(ids), limit) for ids in tokens]
        # prefill all rows at first, then those whose context restarts at block_size
        changed = [row for row, start in enumerate(starts) if start != old_starts[row]]
        rows = changed if use_cache else range(len(tokens))
        windows = [tokens[row][starts[row] :] for row in rows]
        if len(rows) == len(tokens):
            logits = prefill(model, windows, cache)  # (B, V)
        else:
            if rows:
                refill(model, windows, cache, rows)
            decode = decode or make_decoder(model, new[:, None], cache)
            logits = decode(new[:, None])[:, -1]  # (B, V)
        if step == 0 and not logits.isfinite().all():
            warn(f"logits are not finite in {dtype_name(logits.dtype)}; try --dtype float32")
        new = sample(logits, next(uniform), sampling)  # (B,)
        for ids, token in zip(tokens, new.tolist(), strict=True):
            ids.append(token)
        yield [ids[-1] for ids in tokens]


def new_cache(model, rows, capacity):
    """A cache in autocast's dtype or the model's; on a CPU float32 instead of bfloat16."""
    weight = next(model.parameters())
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    if kind == "cpu" and dtype == torch.bfloat16:
        dtype = torch.float32
    return KVCache(model.config, rows, capacity, weight.device, dtype)


def prefill(model, windows, cache=None):
    """Logits (B, V) for the token after each of B windows, lists of ids; fills the cache with them.
    Shorter windows are padded on the right, where causal attention never reaches.
    """
    device, lengths = next(model.parameters()).device, [len(window) for window in windows]
    padded = [window + [0] * (max(lengths) - len(window)) for window in windows]
    if cache is not None:
        cache.set_lengths([0] * len(windows))
    idx, last = torch.tensor(padded, device=device), torch.tensor(lengths, device=device) - 1
    logits, _ = model(idx, cache=cache, last=last)  # (B, 1, V)
    if cache is not None:
        cache.set_lengths(lengths)
    return logits[:, 0]


def refill(model, windows, cache, rows):
    """Prefill these rows again, one token short: the next decode step adds every row's newest."""
    length = len(windows[0])  # the same for all: context_start restarts at half
    part = new_cache(model, len(rows), length)
    prefill(model, windows, part)
    cache.kv[:, :, rows, :, :length] = part.kv
    cache.lengths[rows] = length - 1
    cache.common_length = None


def make_decoder(model, new, cache):
    """A function from the newest tokens (B, 1) to logits (B, 1, V); on a GPU a CUDA graph."""
    mkldnn = torch.backends.mkldnn  # oneDNN; in bf16 it would repack the weights for a single row

    def decode(idx):
        before, mkldnn.enabled = mkldnn.enabled, mkldnn.enabled and len(idx) > 1
        try:
            return model(idx, cache=cache)[0]
        finally:
            mkldnn.enabled = before

    if not use_graph(new.device):
        return with_best_threads(model, decode)
    lengths, cache.common_length = cache.lengths.clone(), None  # no shape depends on the lengths
    with torch.cuda.device(new.device):  # graphs are made on the current device
        replay = torch.cuda.make_graphed_callables(decode, (new.clone(),), num_warmup_iters=1)
    cache.lengths.copy_(lengths)  # as before the warm-up, whose entries are overwritten
    return replay


def use_graph(device) -> bool:
    """Whether to use a CUDA graph: not in autocast (caches weight casts) or fsdp (collectives)."""
    return device.type == "cuda" and world_size() == 1 and not torch.is_autocast_enabled("cuda")


# ---------------------------------------------------------------- text


class TextStream:
    """Incremental decoding of one row, which ends at end of text, or before the stop text."""

    def __init__(self, tokenizer, stop=None):
        self.decoder, self.eot_id, self.stop = StreamDecoder(tokenizer), tokenizer.eot_id, stop
        self.held, self.done = "", False  # held: trailing text that could start the stop text

    def push(self, token: int | None) -> str:
        """The text that one more token makes certain; None ends the row and returns the rest."""
        if self.done:
            return ""
        ends = token in (None, self.eot_id)
        text = self.held + (self.decoder.flush() if ends else self.decoder.push(token))
        before, *after = text.split(self.stop) if self.stop else [text]
        self.done = ends or after != []
        if self.done or not self.stop:
            return before
        prefixes = (self.stop[:n] for n in range(len(self.stop) - 1, 0, -1))
        self.held = next(filter(text.endswith, prefixes), "")
        return text.removesuffix(self.held)


def prompt_ids(tokenizer, prompt) -> list[int]:
    """The prompt's ids; for an empty one end of text, or without that token id 0, often newline."""
    return tokenizer.encode(prompt) if prompt else [tokenizer.eot_id or 0]


def stream_text(model, tokenizer, prompts, sampling, samples, times):
    """Yield the prompts, then, per token, the new text of each; times gets a time per token."""
    rows = [TextStream(tokenizer, sampling.stop) for _ in prompts]
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    yield prompts
    for new in generate_ids(model, ids, sampling, samples):
        times += [time.perf_counter()] * sum(not row.done for row in rows)
        yield [row.push(token) for row, token in zip(rows, new, strict=True)]
        if all(row.done for row in rows):
            return
    yield [row.push(None) for row in rows]


def generate_texts(model, tokenizer, prompts, sampling, batch_size=16, times=None):
    """Yield each text, num_samples a prompt, as an iterable of pieces; one alone in its batch is
    streamed. A time per token goes to times. ValueError up front, a line per unencodable prompt.
    """
    found, longest, limit = [], 0, context_limit(model.config)
    for place, prompt in enumerate(prompts, 1):
        try:
            longest = max(longest, len(tokenizer.encode(prompt)))
        except ValueError as error:
            found.append(f"prompt {place}: {error}")
    if found:
        raise ValueError("\n".join(found))
    if cut := context_start(longest, limit):
        kept = f"its last {longest - cut} (block_size {limit})"
        warn(f"a prompt of {longest} tokens is cropped to {kept}")
    times = [] if times is None else times
    work = [(prompt, number) for prompt in prompts for number in range(sampling.num_samples)]
    for start in range(0, len(work), batch_size):
        batch, samples = zip(*work[start : start + batch_size], strict=True)
        pieces = stream_text(model, tokenizer, batch, sampling, samples, times)
        yield from [chain.from_iterable(pieces)] if len(batch) == 1 else zip(*pieces, strict=True)


def sample_text(model, tokenizer, prompt, max_new_tokens=200, **settings) -> str:
    """The prompt and its continuation; settings: fields of Sampling. Changes no random state."""
    sampling = validate(Sampling(max_new_tokens=max_new_tokens, **settings))
    was_training = model.training
    model.eval()
    try:
        return "".join(next(generate_texts(model, tokenizer, [prompt], sampling)))
    finally:
        model.train(was_training)
