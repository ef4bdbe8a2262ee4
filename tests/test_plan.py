"""docs/plan.py (`bench.py plan`) says what runs take."""

import json
from dataclasses import replace

import plan as script
import pytest
import torch

import model as model_file
from config import GPT2Config
from logger import run
from model import GPT2
from utils import autocast


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--gpu", "h1000"], "h1000"),
        (["--gpus", "0"], "--gpus 0"),
        (["--mfu", "1.5"], "--mfu 1.5"),
        (["--tokens", "nan"], "--tokens nan"),
        (["--n_embd", "100"], "--n_head 12"),
        (["--gpus", "8", "--gradient_accumulation_steps", "12"], "not divisible by 8"),
        (["--parallel", "fsdp", "--dtype", "float16"], "--dtype float16"),
        (["--gpu_memory", "80"], "--gpu_memory"),
    ],
)
def test_bad_input_of_the_plan_is_exit_2(capsys, flags, words):
    assert run(script.main, flags) == 2
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == captured.err.count("\n") == 1 and captured.out == ""
    assert words in captured.err


def plan(capsys, *flags):
    assert run(script.main, [*flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    return json.loads(lines[-1]), "\n".join(lines[:-1])


def test_plan_counts_the_weights_and_what_belongs_to_them(capsys):
    report, table = plan(capsys, "--preset", "gpt2-xl", "--gpus", "64", "--gpu", "h100")
    ddp, fsdp = (report["memory"][parallel]["rows"] for parallel in ("ddp", "fsdp"))
    assert ddp["weights"] == ddp["gradients"] == 4 * 1_557_611_200 == ddp["optimizer"] / 2
    assert fsdp["weights"] * 64 == ddp["weights"] and fsdp["optimizer"] * 64 == ddp["optimizer"]
    assert report["memory"]["ddp"]["bytes"] == sum(ddp.values())
    assert report["memory"]["fsdp"]["saving_bytes"] == 3 * fsdp["weights"] + 4 * 50257 * 1600
    assert "1,557,611,200 parameters" in table and "--mfu" in table and "fits 80 GB" in table


def test_plan_names_fitting_micro_batches(capsys):
    report, table = plan(capsys, "--gpus", "64", "--batch_size", "8")
    assert report["tokens_per_step"] == 64 * 8 * 1024  # 480 sequences and more
    assert "64 processes, 1 times 8 sequences of 1024" in table
    assert "--gradient_accumulation_steps 64" in table


def test_plan_says_the_days_of_published_runs(capsys):
    """nanoGPT's README: 600,000 steps in about 4 days on 8 A100s; llm.c: 10 billion tokens in 45
    minutes on 8 H100s, as modded-nanogpt's README has it.
    """
    nanogpt = ["--gpu", "a100-40gb", "--gradient_accumulation_steps", "40", "--max_iters", "600000"]
    assert 3.5 < plan(capsys, "--gpus", "8", *nanogpt)[0]["days"] < 4.5
    llm_c = plan(capsys, "--gpus", "8", "--gpu", "h100", "--tokens", "1e10", "--mfu", "0.4")[0]
    assert 40 < llm_c["days"] * 24 * 60 < 50
    assert plan(capsys, "--dtype", "float32")[0]["days"] is None  # GPUS's peaks are of bf16


def test_the_largest_batch_that_plan_names_fits_and_the_next_does_not(capsys):
    flags = ["--preset", "gpt2-xl", "--gpu", "a100-40gb", "--activation_checkpointing"]
    report, _ = plan(capsys, *flags)
    size = report["memory"]["fsdp"]["largest_batch_size"]
    more = [*flags, "--gradient_accumulation_steps", "40", "--parallel", "fsdp", "--batch_size"]
    largest, next_one = (plan(capsys, *more, str(n))[0]["memory"]["fsdp"] for n in (size, size + 1))
    assert largest["fits"] and not next_one["fits"] and size > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "change", [{}, {"block_size": 1000}, {"position": "rope"}, {"position": "alibi"}], ids=str
)
def test_plan_knows_what_autograd_keeps(dtype, change, monkeypatch):
    """Its own list of saved tensors on a CPU, whose fused kernel keeps what a GPU's does."""
    monkeypatch.setattr(model_file, "MAX_SCORES", 0)
    config = GPT2Config(vocab_size=50, block_size=200, n_head=2, n_embd=64, dtype=dtype)
    config = replace(config, batch_size=3, gradient_accumulation_steps=1, **change)
    kept, planned = [], []
    for n_layer in (4, 8):
        model = GPT2(replace(config, n_layer=n_layer))
        plan = script.peak_memory(model.config, model, gpus=1)
        assert plan["moment"] in ("forward", "loss")
        planned.append(plan["rows"]["activations"])
        kept.append(saved_bytes(model))
    assert planned[1] - planned[0] == pytest.approx(kept[1] - kept[0], rel=0.01)
    assert planned[0] == pytest.approx(kept[0], rel=0.1)


def saved_bytes(model) -> int:
    """Of the tensors that autograd saves in a forward pass; weights and their copies left out."""
    config, sizes, keep = model.config, {}, []
    idx = torch.zeros(config.batch_size, config.block_size, dtype=torch.int64)
    shapes = {p.shape for p in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes}

    def pack(tensor):
        if tensor.shape not in shapes:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            keep.append(tensor)  # or another would get its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with autocast(torch.device("cpu"), config.dtype):
            model(idx, idx)
    return sum(sizes.values())
