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
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            model.set_submodule(name, make(layer))


@torch.no_grad()
def to_int8(model):
    """The float32 model with int8 weights in its linear layers and token embedding, a scale a row;
    the rest stays float32. It can only predict. ValueError unless it is on a CPU.
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
    largest = torch.maximum(weight.amax(dim=1), -weight.amin(dim=1))
    scale, zeros = (largest / 127).clamp(min=1e-12), torch.zeros(len(weight), dtype=torch.int64)
    with warnings.catch_warnings(action="ignore"):  # torch will drop this type, not the kernel
        return torch.quantize_per_channel(weight, scale, zeros, 0, torch.qint8)


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


class PackedLinear(nn.Module):
    """A linear layer for bf16, packed for oneDNN: twice as fast for 8 rows, slower for one."""

    def __init__(self, linear, rows):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack_linears(model, rows):
    """Pack the linear layers of a bf16 model on a CPU for several rows; then it only predicts."""
    weight = next(model.parameters())
    if rows > 1 and weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
        if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            replace_linears(model, lambda layer: PackedLinear(layer, rows))


def with_best_threads(model, decode):
    """decode (idx to logits) with all threads or half of them, as was faster in 4 of 64 steps
    (beside a busy program); in bf16 and int8, where their number changes no result.
    """
    weight, most = model.transformer.wte.weight, torch.get_num_threads()
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.int8):
        return decode
    counts, seconds, steps = (most, max(1, most // 2)), {}, itertools.count()

    def timed(idx):
        step = next(steps) % 64
        is_trial = step < 4  # two each: the first step after a change is slower
        count = counts[step // 2] if is_trial else min(seconds, key=seconds.get)
        if count != most:  # setting it empties oneDNN's cache
            torch.set_num_threads(count)
        start = time.perf_counter()
        try:
            return decode(idx)
        finally:
            if is_trial:
                seconds[count] = time.perf_counter() - start
            if count != most:
                torch.set_num_threads(most)

    return timed
