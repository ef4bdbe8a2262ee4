"""The benchmark measures what it says; how fast anything is, is not tested."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import bench
from config import GPT2_CONFIGS, GPT2Config
from logger import run
from model import GPT2

TINY = ["--preset", "shakespeare-cpu", "--vocab_size", "65", "--batch_size", "1", "--device", "cpu"]


def test_contenders_take_turns_after_a_warm_up():
    turns = []

    def contender(name):
        return lambda: turns.append(name) or (10, len(turns), 5.0)

    results = bench.take_turns({name: contender(name) for name in "AB"}, samples=2)
    assert "".join(turns) == "ABABAB"
    assert results["A"] == {"units": [10, 10], "seconds": [3, 5], "peak_mb": 5.0}


def test_table_gives_medians_and_ratios_to_the_first():
    results = {
        "ours": {"units": [90, 40, 20], "seconds": [1] * 3, "peak_mb": 100.0, "utilisation": 0.5},
        "theirs": {"units": [10], "seconds": [1], "peak_mb": None},
    }
    rows = bench.table({"unit": "tokens", "results": results}).splitlines()
    assert rows[1].split() == ["ours", "40.00", "1.00", "100", "50%"]
    assert rows[2].split() == ["theirs", "10.00", "4.00", "n/a", "n/a"]


@pytest.mark.parametrize("to_loss, seconds", [(1.9, 2.0), (1.0, None)])
def test_seconds_to_a_loss_are_those_of_the_first_evaluation_at_or_below_it(
    to_loss, seconds, monkeypatch
):
    def train(command, check):
        folder = Path(command[command.index("--log_dir") + 1], "a_run")
        folder.mkdir(parents=True)
        curve = [(0.5, None), (1.0, 2.5), (2.0, 1.9), (3.0, 1.95), (4.0, 1.8)]
        records = [{"seconds": s, **({"val_loss": loss} if loss else {})} for s, loss in curve]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))

    monkeypatch.setattr(bench.subprocess, "run", train)
    report = bench.bench_to_loss(bench.BenchOptions("train", to_loss=to_loss), GPT2Config())
    assert report["results"]["ours"]["seconds_to_loss"] == seconds
    header, row = (line.split() for line in bench.table(report).splitlines())
    assert header == ["to", str(to_loss), "in", "all", "last", "loss"]
    assert row == ["ours", f"{seconds or 'never'}", "4.0", "1.8000"]


@pytest.mark.slow
@pytest.mark.parametrize("work", ["train", "generate"])
def test_a_table_and_then_one_line_of_json(work, tmp_path, capsys):
    flags = [*TINY, "--samples", "1", "--new_tokens", "5"]
    assert run(bench.main, [work, *flags, "--save", str(tmp_path / "r.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert report == json.loads((tmp_path / "r.json").read_text()) and len(lines) > 2
    for result in report["results"].values():
        assert len(result["seconds"]) == 1 and min(result["seconds"]) > 0


def test_a_script_is_timed_as_a_whole_process():
    units, seconds, peak_mb = bench.time_script(["-c", "import time; time.sleep(0.1)"], 3.0)
    assert units == 3.0 and 0.1 < seconds < 10 and 1 < peak_mb < 500
    with pytest.raises(ValueError, match="exit 3"):
        bench.time_script(["-c", "raise SystemExit(3)"], 3.0)


def test_a_training_sample_makes_the_steps_that_it_counts():
    config = replace(GPT2Config(), **GPT2_CONFIGS["shakespeare-cpu"])
    config = replace(config, vocab_size=65, batch_size=2, device="cpu", dtype="float32")
    model = GPT2(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    options = bench.BenchOptions("train", steps=3)
    assert bench.training(model, optimizer, options, config)() == 3 * 2 * 64
    assert len(steps) == 3


@pytest.mark.parametrize(
    "flags, words",
    [
        (["fly"], "fly"),
        (["train", "--nanogpt", "nowhere"], "nowhere"),
        (["train", "--samples", "0"], "--samples"),
        (["train", "--device", "abacus"], "--device abacus"),
    ],
)
def test_bad_input_of_the_benchmark_is_exit_2(capsys, flags, words):
    assert run(bench.main, flags) == 2
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == captured.err.count("\n") == 1 and captured.out == ""
    assert words in captured.err


def test_plan_is_a_script_beside_its_page():
    command = [sys.executable, str(ROOT / "bench.py"), "plan", "--gpus", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "GB a process" in done.stdout
