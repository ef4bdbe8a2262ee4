"""Linear layers made for generating on a CPU: int8 weights, and bf16 weights packed for oneDNN.

from quantize import pack_linears, to_int8
model = to_int8(model.float())  # load_model(..., dtype="int8") does this
pack_linears(model, rows=8)     # a bf16 model that generates 8 texts at once
"""

import itertools
import time
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F


def replace_linears(model, make):
    """Put make(layer) in the place of every linear layer."""
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                setattr(module, name, make(layer))


# ---------------------------------------------------------------- int8


def to_int8(model):
    """The float32 model with int8 weights in its linear layers and token embedding, a scale for
    each row of a weight (an output channel, a token). It can only predict; biases, norms, positions
    and what flows between layers stay float32. ValueError unless it is on a CPU.
    """
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ValueError(f"--dtype int8: for a CPU, not {device}; use bfloat16 or float16 there")
    head = quantize_rows(model.lm_head.weight)
    model.lm_head = Int8Linear(head, None)
    model.transformer.wte = Int8Embedding(head)  # tied
    replace_linears(model, lambda layer: Int8Linear(quantize_rows(layer.weight), layer.bias))
    return model


def quantize_rows(weight):
    """weight (rows, columns) as a quantized int8 tensor, each row with a scale of its own."""
    scale = torch.stack(torch.aminmax(weight.detach(), dim=1)).abs().amax(dim=0) / 127  # (rows,)
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    with warnings.catch_warnings():  # torch will drop this type of tensor, not the kernel
        warnings.simplefilter("ignore")
        scale = scale.clamp(min=1e-12)
        return torch.quantize_per_channel(weight.detach(), scale, zeros, 0, torch.qint8)


class Int8Linear(nn.Module):
    """A linear layer with int8 weights; its input is quantized on each call, by its range."""

    def __init__(self, quantized, bias):
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack(quantized, bias)
        self.reduce_range = not torch.cpu._is_vnni_supported()  # older CPUs add up in 16 bits

    def forward(self, x):
        return torch.ops.quantized.linear_dynamic(x, self.packed, self.reduce_range)


class Int8Embedding(nn.Module):
    def __init__(self, quantized):
        super().__init__()
        self.weight, self.scale = quantized.int_repr(), quantized.q_per_channel_scales().float()

    def forward(self, idx):
        return F.embedding(idx, self.weight) * self.scale[idx][..., None]  # (B, T, C)


# ---------------------------------------------------------------- bf16


class PackedLinear(nn.Module):
    """A linear layer for bf16 inference, its weights prepacked for oneDNN: about twice as fast at 8
    rows.
    """

    def __init__(self, linear, rows):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack_linears(model, rows=1):
    """Pack the linear layers of a bf16 model on a CPU for this many rows; from then on it can only
    predict. For one row, PyTorch's own kernel is faster.
    """
    weight = next(model.parameters())
    if rows == 1 or weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        replace_linears(model, lambda layer: PackedLinear(layer, rows))


# ---------------------------------------------------------------- threads

TRIAL_EVERY = 64  # steps


def with_best_threads(model, decode):
    """decode (idx to logits) with all threads or half of them, whichever was faster in the first
    steps of every TRIAL_EVERY: beside a busy program threads mostly wait for each other. Only in
    bf16 and int8, whose kernels give the same numbers for any number of threads.
    """
    wte, most = model.transformer.wte, torch.get_num_threads()
    if wte.weight.device.type != "cpu" or wte.weight.dtype not in (torch.bfloat16, torch.int8):
        return decode
    counts, seconds, steps = (most, max(1, most // 2)), {}, itertools.count()

    def timed(idx):
        step = next(steps) % TRIAL_EVERY
        trial = step // 2 if step < 4 else None  # the first step after a change is slower
        count = min(seconds, key=seconds.get) if trial is None else counts[trial]
        try:
            if count != most:  # setting it empties oneDNN's cache
                torch.set_num_threads(count)
            start = time.perf_counter()
            logits = decode(idx)
            if trial is not None:
                seconds[count] = time.perf_counter() - start
            return logits
        finally:
            if count != most:
                torch.set_num_threads(most)

    return timed
