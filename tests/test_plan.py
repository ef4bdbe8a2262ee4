"""`bench.py plan` (docs/bench_plan.py) says what runs take."""

import json
from dataclasses import replace

import bench_plan
import pytest
import torch
from conftest import ROOT

import model as model_file
from config import GPT2Config
from model import GPT2
from utils import autocast


@pytest.fixture
def plan(capsys):
    def call(flags):
        assert bench_plan.main(flags.split()) == 0
        *lines, report = capsys.readouterr().out.splitlines()
        return json.loads(report), "\n".join(lines)

    return call


def test_the_page_shows_the_plan_of_today_which_counts_all_weights(plan):
    report, table = plan("--preset gpt2-xl --gpus 64 --gpu h100")
    assert table.strip() in (ROOT / "docs" / "scaling.md").read_text("utf-8")
    ddp, fsdp = (report["memory"][parallel]["rows"] for parallel in ("ddp", "fsdp"))
    assert ddp["weights"] == ddp["gradients"] == 4 * 1_557_611_200 == ddp["optimizer"] / 2
    assert fsdp["weights"] * 64 == ddp["weights"] and fsdp["optimizer"] * 64 == ddp["optimizer"]
    assert report["memory"]["ddp"]["bytes"] == sum(ddp.values())
    assert report["memory"]["fsdp"]["saving_bytes"] == 3 * fsdp["weights"] + 4 * 50257 * 1600


def test_plan_says_the_days_of_published_runs(plan):
    """docs/scaling.md: nanoGPT's 4 days on 8 A100s, llm.c's 45 minutes on 8 H100s."""
    nanogpt = "--gpu a100-40gb --gradient_accumulation_steps 40 --max_iters 600000"
    assert round(plan(nanogpt)[0]["days"], 2) == 3.9
    assert round(plan("--gpu h100 --tokens 1e10 --mfu 0.4")[0]["days"] * 24 * 60) == 45
    assert plan("--dtype float32")[0]["days"] is None  # GPUS's peaks are of bf16


def test_the_largest_batch_that_plan_names_fits_and_the_next_does_not(plan):
    flags = "--preset gpt2-xl --gpu a100-40gb --activation_checkpointing"
    size = plan(flags)[0]["memory"]["fsdp"]["largest_batch_size"]
    flags += " --gradient_accumulation_steps 40 --parallel fsdp --batch_size"
    fits = [plan(f"{flags} {n}")[0]["memory"]["fsdp"]["fits"] for n in (size, size + 1)]
    assert fits == [True, False] and size > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("position", ["learned", "rope", "alibi"])
def test_plan_knows_what_autograd_keeps(dtype, position, monkeypatch):
    """Its own list of saved tensors on a CPU, whose fused kernel keeps what a GPU's does."""
    monkeypatch.setattr(model_file, "MAX_SCORES", 0)
    shape = {"block_size": 300, "n_head": 2, "n_embd": 64, "position": position}
    config = GPT2Config(50, **shape, dtype=dtype, batch_size=3, gradient_accumulation_steps=1)
    kept, planned = [], []
    for n_layer in (4, 8):
        model = GPT2(replace(config, n_layer=n_layer))
        planned.append(bench_plan.peak_memory(model.config, model, 1)["rows"]["activations"])
        kept.append(saved_bytes(model))
    assert planned[1] - planned[0] == pytest.approx(kept[1] - kept[0], rel=0.01)
    assert planned[0] == pytest.approx(kept[0], rel=0.1)


def saved_bytes(model) -> int:
    """Of the tensors that autograd saves in a forward pass; weights and their copies left out."""
    config, kept = model.config, {}
    idx = torch.zeros(config.batch_size, config.block_size, dtype=torch.int64)
    shapes = {shape for p in model.parameters() for shape in (p.shape, p.shape[::-1])}

    def pack(tensor):
        if tensor.shape not in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with autocast(torch.device("cpu"), config.dtype):
            model(idx, idx)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
