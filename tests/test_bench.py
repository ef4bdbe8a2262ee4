"""The benchmark measures what it says, and the plan says what runs take; how fast anything is, is
not tested.

    python tests/test_bench.py CONFIG.json   # trains, and prints by how many bytes it grew: a child
"""

import json
import os
import re
import resource
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import bench
import model as model_file
import prepare_data
import train as training
from config import GPT2Config, to_dict
from model import GPT2
from utils import autocast, process_group, run

TINY = ["--preset", "shakespeare-cpu", "--batch_size", "1", "--samples", "1", "--device", "cpu"]


def test_rate_is_the_median_of_units_a_second():
    assert bench.rate({"units": [10, 10, 10], "seconds": [1, 5, 2]}) == 5
    assert bench.rate({"units": [10, 30], "seconds": [1, 1]}) == 20


def test_table_gives_ratios_to_the_first():
    results = {
        "ours": {"units": [40], "seconds": [1], "peak_mb": 100.0, "utilisation": 0.5},
        "theirs": {"units": [10], "seconds": [1], "peak_mb": None},
    }
    rows = bench.table({"unit": "tokens", "results": results}).splitlines()
    assert rows[1].split() == ["ours", "40.00", "1.00", "100", "50%"]
    assert rows[2].split() == ["theirs", "10.00", "4.00", "n/a", "n/a"]


def test_seconds_to_a_loss_are_those_of_the_first_evaluation_at_or_below_it():
    curve = [(1.0, 2.5), (2.0, 1.9), (3.0, 1.95), (4.0, 1.8)]
    assert bench.curve_result(curve, 1.9)["seconds_to_loss"] == 2.0
    assert bench.curve_result(curve, 1.0)["seconds_to_loss"] is None


@pytest.mark.slow
@pytest.mark.parametrize("work", ["train", "save"])
def test_a_table_and_then_one_line_of_json(work, tmp_path, capsys):
    assert run(bench.main, [work, *TINY, "--save", str(tmp_path / "r.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert report == json.loads((tmp_path / "r.json").read_text()) and len(lines) > 2
    for result in report["results"].values():
        assert len(result["seconds"]) == 1 and min(result["seconds"]) > 0


@pytest.mark.slow
def test_several_processes_do_the_same_step_as_one(capsys):
    flags = ["--processes", "1,2", "--block_size", "8", "--steps", "2"]
    assert run(bench.main, ["train", *TINY, *flags]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    alone, together = results["1 process"], results["2 processes"]
    assert alone["units"] == together["units"] == [2 * 2 * 8]  # steps, micro-batches, tokens
    speed = alone["seconds"][0] / together["seconds"][0]
    assert alone["efficiency"] == 1 and together["efficiency"] == pytest.approx(speed / 2)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["train", "--nanogpt", "nowhere"], "nowhere"),
        (["train", "--samples", "0"], "--samples"),
        (["train", "--processes", "1,0"], "--processes 1,0"),
        (["train", "--processes", "1,x"], "--processes"),
        (["plan", "--gpu", "h1000"], "h1000"),
        (["plan", "--gpus", "0"], "--gpus 0"),
        (["plan", "--mfu", "1.5"], "--mfu 1.5"),
        (["plan", "--tokens", "nan"], "--tokens nan"),
        (["plan", "--n_embd", "100"], "--n_head 12"),
        (["plan", "--gpus", "8", "--gradient_accumulation_steps", "12"], "not divisible by 8"),
        (["plan", "--parallel", "fsdp", "--dtype", "float16"], "--dtype float16"),
        (["plan", "--gpu_memory", "80"], "--gpu_memory"),
    ],
)
def test_bad_input_of_the_benchmark_is_exit_2(capsys, flags, words):
    assert run(bench.main, flags) == 2
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == captured.err.count("\n") == 1 and captured.out == ""
    assert words in captured.err


# ---------------------------------------------------------------- plan


def plan(capsys, *flags):
    assert run(bench.main, ["plan", *flags]) == 0
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


def test_plan_says_the_days_of_published_runs(capsys):
    """nanoGPT's README: 600,000 steps in about 4 days on 8 A100s; llm.c: 10 billion tokens in 45
    minutes on 8 H100s, as modded-nanogpt's README has it.
    """
    nanogpt = ["--gpu", "a100-40gb", "--gradient_accumulation_steps", "40", "--max_iters", "600000"]
    assert 3.5 < plan(capsys, "--gpus", "8", *nanogpt)[0]["days"] < 4.5
    llm_c = plan(capsys, "--gpus", "8", "--gpu", "h100", "--tokens", "1e10", "--mfu", "0.4")[0]
    assert 40 < llm_c["days"] * 24 * 60 < 50


def test_the_largest_batch_that_plan_names_fits_and_the_next_does_not(capsys):
    flags = ["--preset", "gpt2-xl", "--gpu", "a100-40gb", "--activation_checkpointing"]
    report, _ = plan(capsys, *flags)
    size = report["memory"]["fsdp"]["largest_batch_size"]
    more = [*flags, "--gradient_accumulation_steps", "40", "--parallel", "fsdp", "--batch_size"]
    largest, next_one = (plan(capsys, *more, str(n))[0]["memory"]["fsdp"] for n in (size, size + 1))
    assert largest["fits"] and not next_one["fits"] and size > 1


@pytest.mark.parametrize("dtype, plain", [("float32", 0), ("bfloat16", 0), ("bfloat16", 2**24)])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"block_size": 1000},
        {"position": "rope", "block_size": 1000},
        {"position": "alibi", "block_size": 1000},
        {"dropout": 0.1},
        {"vocab_size": 8000},
    ],
    ids=str,
)
def test_plan_knows_what_a_block_keeps_for_its_backward_pass(dtype, plain, change, monkeypatch):
    """Against autograd's own list, on a CPU: two layers keep that much more than one."""
    for module in (bench, model_file):
        monkeypatch.setattr(module, "MOST_SCORES", plain)
    config = GPT2Config(vocab_size=50, block_size=100, n_head=2, n_embd=64, dtype=dtype)
    config = replace(config, batch_size=3, **change)
    numbers = 3 * config.block_size * config.vocab_size
    kept = [bytes_kept(replace(config, n_layer=layers)) for layers in (1, 2)]
    w, h = bench.widths(config)
    block = bench.block_activations(config, w, h, sharded=False, on_cpu=True)
    assert kept[1] - kept[0] == pytest.approx(block, rel=0.01)
    ends = bench.end_activations(config, w, h, on_cpu=True)
    ends += numbers * (h if numbers > 2**20 else 4)  # many: the logits, few: their probabilities
    assert kept[0] - block == pytest.approx(ends, rel=0.15)


def bytes_kept(config):
    """Of the tensors that autograd saves in a forward pass; weights and their copies left out."""
    model, sizes, keep = GPT2(config), {}, []
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


# ---------------------------------------------------------------- plan, against real runs

SHAPE = {"n_layer": 6, "n_embd": 512, "n_head": 8, "block_size": 256, "batch_size": 8}
SMALL = {"n_layer": 2, "n_embd": 512, "n_head": 8, "block_size": 256, "batch_size": 4}
NARROW = {"n_layer": 4, "n_embd": 256, "n_head": 4, "block_size": 256, "batch_size": 4}
BF16, FLOAT32 = {"dtype": "bfloat16"}, {"dtype": "float32"}
MUON, FSDP, RECOMPUTED = (
    {"optimizer": "muon"},
    {"parallel": "fsdp"},
    {"activation_checkpointing": True},
)
TWICE, FOUR_TIMES = {"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 4}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize(
    "processes, vocabulary, change",
    [
        (1, 64, SHAPE | BF16 | {"batch_size": 16}),
        (1, 64, SHAPE | BF16 | {"dropout": 0.1}),
        (1, 64, SHAPE | FLOAT32),
        (1, 64, SHAPE | BF16 | MUON),
        (1, 64, SHAPE | BF16 | RECOMPUTED | {"batch_size": 16}),
        (1, 64, NARROW | BF16 | {"batch_size": 16}),
        (1, 8000, SMALL | FLOAT32 | TWICE),
        (1, 8000, SHAPE | FLOAT32 | MUON | {"batch_size": 4}),
        (1, 50257, NARROW | BF16),
        (1, 50257, NARROW | BF16 | MUON),
        (2, 64, SHAPE | BF16 | FOUR_TIMES),
        (2, 64, SHAPE | BF16 | TWICE | MUON),
        (2, 8000, SMALL | FLOAT32 | TWICE),
        (2, 50257, NARROW | BF16 | FOUR_TIMES),
        (2, 50257, SMALL | BF16 | TWICE | {"batch_size": 2, "block_size": 128}),
        (2, 64, SHAPE | BF16 | FOUR_TIMES | FSDP),
        (2, 64, SHAPE | BF16 | TWICE | MUON | FSDP),
        (2, 8000, SMALL | BF16 | FOUR_TIMES | FSDP | {"batch_size": 8}),
        (2, 50257, NARROW | FLOAT32 | TWICE | FSDP | {"batch_size": 1, "block_size": 64}),
    ],
    ids=str,
)
def test_plan_predicts_the_peak_memory_of_a_real_run(tmp_path, processes, vocabulary, change):
    gives_back = "parallel" in change or "activation_checkpointing" in change
    config = replace(
        GPT2Config(vocab_size=vocabulary, gradient_accumulation_steps=1, preset="none"),
        **change,
        data_dir=many_characters(tmp_path, vocabulary),
        checkpoint_dir=str(tmp_path / "checkpoints"),
        log_dir=str(tmp_path / "runs"),
        max_iters=3 if gives_back else 12,  # a heap with holes grows for some steps
        eval_iters=1,
        device="cpu",
    )
    with torch.device("meta"):
        model = GPT2(config)
    predicted = bench.peak_memory(config, model, processes, on_cpu=True)["bytes"]
    # where tensors are large, runs differ by the holes that these happen to find
    times = 3 if vocabulary > 50_000 and not gives_back else 1
    runs = sorted(growth_of_a_run(tmp_path, config, processes) for _ in range(times))
    grown = runs[times // 2]
    shown = " ".join(f"{run / 1e6:.0f}" for run in runs)
    print(f"plan {predicted / 1e6:.0f} MB, run {shown} MB: {predicted / grown:.3f}")
    assert grown > 250e6 and predicted == pytest.approx(grown, rel=0.15)


def many_characters(tmp_path, count):
    """A data set of characters, `count` different ones."""
    alphabet = "".join(chr(0x10000 + i) for i in range(count))
    text = tmp_path / "text.txt"
    text.write_text(alphabet * (2 + 8000 // count), "utf-8")
    prepare_data.prepare_file(text, "char", tmp_path / "data")
    return str(tmp_path / "data")


def growth_of_a_run(tmp_path, config, processes) -> int:
    """The most bytes by which a process of a run of train.py grows."""
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)), "utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if processes > 1 else {})
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"WORLD_SIZE": str(processes)}
    command = [sys.executable, __file__, str(tmp_path / "config.json")]
    children = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    return max(int(child.communicate(timeout=300)[0]) for child in children)


def grow(path):
    """Train as the config at path says, and print by how many bytes the process grew beyond its
    size just before the model was built, a tiny run having loaded all code that training needs.
    """
    config = replace(GPT2Config(), **json.loads(Path(path).read_text("utf-8")))
    tiny = replace(config, n_layer=1, n_embd=32, n_head=2, block_size=32, batch_size=1)
    build, before = training.Trainer.build, []

    def noting(self, *arguments):
        status = Path("/proc/self/status").read_text()
        before.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024)
        build(self, *arguments)

    training.Trainer.build = noting
    with process_group(torch.device("cpu")):
        training.train(tiny, fresh=True)
        training.train(config, fresh=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before[-1])


if __name__ == "__main__":
    grow(sys.argv[1])
