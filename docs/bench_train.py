"""Tokens a second while training, beside nanoGPT.

python bench.py train --nanogpt nanoGPT --batch_size 4 --block_size 256
"""

import contextlib
import importlib.util
import sys
from dataclasses import dataclass, replace

import torch
from bench_common import LIMIT, InTurns, compare, gemm_flops, on_cuda, run_work

from model import GPT2
from optim import make_optimizer
from options import integer
from parallel import compile_model
from utils import autocast, deterministic, set_up_device


@dataclass(kw_only=True)
class TrainOptions(InTurns):
    # training
    steps: integer(1) = 1  # training steps in a sample


def compare_training(options, config, ours=None) -> dict:
    """Their share is that of a large matrix product's FLOP/s."""
    contenders = ours or {"ours": (ours_training, config)}
    if options.nanogpt:
        contenders["nanoGPT"] = nanogpt_training, as_nanogpt(config)
    results = compare(contenders, options, lambda: gemm_flops(config))
    with torch.device("meta"):
        flops = GPT2(config).flops_per_token()
    peak = results.pop(LIMIT)["per_second"]
    for result in results.values():
        result["utilisation"] = result["per_second"] * flops / peak
    return {"unit": "tokens", "gemm_flops": peak, "results": results}


def ours_training(options, config):
    set_up_device(torch.device(config.device))
    model = GPT2(config).to(config.device)
    forward = compile_model(model) if config.compile else model
    return training(forward, make_optimizer(model, config), options, config)


def nanogpt_training(options, config):
    torch.backends.cuda.matmul.allow_tf32 = True  # as in its train.py
    model, optimizer = nanogpt_model(options, config)
    model = torch.compile(model, disable=not config.compile)
    return training(model, optimizer, options, config)


def nanogpt_model(options, config):
    """nanoGPT's model in config's shape, and its optimizer."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", f"{options.nanogpt}/model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    shape = module.GPTConfig(**{name: getattr(config, name) for name in names})
    kind, betas = torch.device(config.device).type, (config.beta1, config.beta2)
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it does
        model = module.GPT(shape).to(config.device)
        return model, model.configure_optimizers(0.1, config.learning_rate, betas, kind)


def as_nanogpt(config):
    """config with nanoGPT's own defaults: float32 on a CPU, bf16 on CUDA, a padded vocabulary."""
    dtype, V = "bfloat16" if on_cuda(config) else "float32", config.vocab_size
    return replace(config, dtype=dtype, deterministic=False, vocab_size=50304 if V == 50257 else V)


def training(model, optimizer, options, config):
    """Steps on a random batch as train.py makes them."""
    shape = config.batch_size, config.block_size + 1
    idx = torch.randint(config.vocab_size, shape, device=config.device)
    x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()  # (B, T) each

    def sample():
        with deterministic(config.deterministic and idx.is_cuda):
            for _ in range(options.steps):
                training_step(model, optimizer, x, y, config.dtype)
        return options.steps * x.numel()

    return sample


def training_step(model, optimizer, x, y, dtype):
    """Returns the loss."""
    with autocast(x.device, dtype):
        loss = model(x, y)[1]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def main(argv) -> int:
    return run_work("train", argv, __doc__, TrainOptions, compare_training)
