"""The benchmark measures what it says; how fast anything is, is not tested."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import gpu
import pytest
import to_loss
import torch
from conftest import ROOT

import bench
from config import GPT2_CONFIGS, GPT2Config
from logger import run
from model import GPT2

TINY = ["--preset", "shakespeare-cpu", "--vocab_size", "65", "--batch_size", "1", "--device", "cpu"]


def tiny_config(**values):
    config = replace(GPT2Config(), **GPT2_CONFIGS["shakespeare-cpu"])
    shape = {"n_layer": 1, "n_embd": 16, "vocab_size": 65, "batch_size": 2, "compile": False}
    return replace(config, device="cpu", dtype="float32", **shape | values)


def test_contenders_take_turns_after_a_warm_up():
    turns = []

    def contender(name):
        return lambda: turns.append(name) or (10, len(turns), 5.0)

    results = bench.take_turns({name: contender(name) for name in "AB"}, samples=2)
    assert sorted(turns[:2]) == ["A", "B"] and "".join(turns[2:]) == "ABAB"
    assert results["A"]["units"] == (10, 10) and results["A"]["seconds"] == (3, 5)
    assert results["A"]["per_second"] == (10 / 3 + 10 / 5) / 2 and results["A"]["first/this"] == 1
    assert results["B"]["first/this"] == (1 / 3 + 1 / 5) / (1 / 4 + 1 / 6)


def test_table_gives_the_numbers_of_each_row_and_then_those_of_the_report():
    results = {
        "ours": {"per_second": 40.0, "peak_mb": 1234.5, "seconds": [1.0], "utilisation": 0.51234},
        "theirs": {"per_second": 10, "peak_mb": None, "seconds": [2.0], "utilisation": 0.1},
    }
    table = bench.table({"unit": "tokens", "peak": 3e12, "results": results})
    assert [line.split() for line in table.splitlines()] == [
        ["tokens", "per_second", "peak_mb", "utilisation"],
        ["ours", "40", "1,234", "0.5123"],
        ["theirs", "10", "n/a", "0.1"],
        ["peak", "3e+12"],
    ]


def test_shares_are_of_what_the_machine_does_at_most(monkeypatch):
    """100 tokens a second: 100 times a token's FLOPs; 50 times all weights, 2 streams at once."""
    found = {name: {"per_second": 100.0} for name in ("ours", "int8")}
    monkeypatch.setattr(bench, "compare", lambda contenders, options: found)
    monkeypatch.setattr(bench, "gemm_flops", lambda config: 1e9)
    monkeypatch.setattr(bench, "read_bandwidth", lambda config: 1e8)
    config, options = tiny_config(), bench.BenchOptions(work="train", streams=2)
    model = GPT2(config)
    share = bench.bench_train(options, config)["results"]["ours"]["utilisation"]
    assert share == 100 * model.flops_per_token() / 1e9
    contenders = {"ours": (None, config), "int8": (None, replace(config, dtype="int8"))}
    rows = bench.compare_generating(contenders, options, config)["results"]
    weights = model.num_params() - model.transformer.wpe.weight.numel()
    shares = [rows[name]["utilisation"] for name in contenders]
    assert shares == [50 * 4 * weights / 1e8, 50 * weights / 1e8]


def test_busy_processes_are_there_and_leave():
    with bench.spinning(2):
        time.sleep(0.5)
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        if children.exists():  # on Linux
            assert len(children.read_text().split()) >= 2
    started = bench.subprocess.Popen
    with pytest.MonkeyPatch.context() as patch:
        processes = []
        patch.setattr(subprocess, "Popen", lambda c: processes.append(started(c)) or processes[-1])
        with bench.spinning(2):
            assert [process.poll() for process in processes] == [None, None]
    assert all(process.poll() is not None for process in processes)


@pytest.mark.parametrize("name", ["transformers", "ctranslate2"])
def test_the_others_have_our_weights(name):
    """Greedy, they give the tokens that ours gives."""
    other = pytest.importorskip(name)
    config, options = tiny_config(gelu="tanh"), bench.BenchOptions(work="generate", new_tokens=8)
    prompt = bench.prompts_of(options, config).tolist()
    model = bench.our_model(config, 1)
    ours = [row[0] for row in bench.generate_ids(model, prompt, bench.Sampling(8, temperature=0))]
    if name == "transformers":
        idx = torch.tensor(prompt)
        found = bench.transformers_model(config).generate(idx, max_new_tokens=8, do_sample=False)
        assert found[0, 10:].tolist() == ours
    else:
        made = []
        with pytest.MonkeyPatch.context() as patch:
            generate = other.Generator.generate_batch

            def greedy(generator, prompts, **how):
                made.extend(generate(generator, prompts, **how | {"sampling_topk": 1}))
                return made

            patch.setattr(other.Generator, "generate_batch", greedy)
            assert bench.ctranslate2_generating(options, config)() == 8
        assert made[0].sequences_ids[0] == ours


@pytest.mark.parametrize("loss, seconds", [(1.9, 2.0), (1.0, None)])
def test_seconds_to_a_loss_are_those_of_the_first_evaluation_at_or_below_it(
    loss, seconds, monkeypatch
):
    def train(command, check):
        folder = Path(command[command.index("--log_dir") + 1], "a_run")
        folder.mkdir(parents=True)
        curve = [(0.5, None), (1.0, 2.5), (2.0, 1.9), (3.0, 1.95), (4.0, 1.8)]
        records = [{"seconds": s, **({"val_loss": loss} if loss else {})} for s, loss in curve]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))

    monkeypatch.setattr(subprocess, "run", train)
    report = to_loss.race(to_loss.LossOptions(loss=loss), tiny_config())
    assert report["results"]["ours"]["to_loss"] == seconds
    header, row, _ = (line.split() for line in bench.table(report).splitlines())
    assert header == ["seconds", "to_loss", "in_all", "last_loss"]
    assert row == ["ours", f"{seconds:g}" if seconds else "n/a", "4", "1.8"]


@pytest.mark.slow
@pytest.mark.parametrize("work", ["train", "generate"])
def test_a_table_and_then_one_line_of_json(work, tmp_path, capsys):
    flags = [*TINY, "--samples", "1", "--new_tokens", "5", "--busy", "1"]
    assert run(bench.main, [work, *flags, "--save", str(tmp_path / "r.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert report == json.loads((tmp_path / "r.json").read_text()) and len(lines) > 2
    for result in report["results"].values():
        assert len(result["seconds"]) == 1 and min(result["seconds"]) > 0
        assert result["utilisation"] > 0


def test_a_script_is_timed_as_a_whole_process():
    units, seconds, peak_mb = bench.time_script(["-c", "import time; time.sleep(0.1)"], 3.0)
    assert units == 3.0 and 0.1 < seconds < 10 and 1 < peak_mb < 500
    with pytest.raises(ValueError, match="exit 3"):
        bench.time_script(["-c", "raise SystemExit(3)"], 3.0)


def test_a_training_sample_makes_the_steps_that_it_counts():
    config = tiny_config()
    model = GPT2(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    options = bench.BenchOptions(work="train", steps=3)
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


# ---------------------------------------------------------------- docs/gpu.py


def test_a_stage_that_fails_is_a_line_and_the_next_ones_are_kept_as_they_come(
    tmp_path, monkeypatch, capsys
):
    def broken(options, config):
        raise RuntimeError("no kernel\nand a long story")

    def whole(options, config):
        kept = (tmp_path / "gpu.jsonl").read_text().splitlines()
        return {"unit": "", "results": {"kept": {"lines": len(kept)}}}

    monkeypatch.setattr(gpu, "STAGES", {"broken": broken, "whole": whole})
    monkeypatch.setattr(gpu, "own_process", lambda: ThreadPoolExecutor(1))
    monkeypatch.setattr(gpu, "prepare", lambda *_: None)
    (tmp_path / "gpu.jsonl").write_text('{"stage": "earlier"}\n')
    assert run(gpu.main, ["--dry_run", "--save", str(tmp_path / "gpu.jsonl")]) == 1
    records = map(json.loads, (tmp_path / "gpu.jsonl").read_text().splitlines())
    earlier, machine, first, second = records
    assert (earlier["stage"], machine["stage"]) == ("earlier", "machine")
    assert first == {"stage": "broken", "error": "RuntimeError: no kernel"}
    assert second["results"]["kept"]["lines"] == 3
    assert "RuntimeError: no kernel" in capsys.readouterr().out


def test_no_stage_begins_after_the_minutes():
    options = gpu.GpuOptions()
    assert "not started" in gpu.run_stage("limits", options, None, time.monotonic() - 1)["error"]


def test_help_explains_each_stage(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"{name} " in shown and stage.__doc__ in shown for name, stage in gpu.STAGES.items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_it_names_the_dry_run(capsys):
    assert run(gpu.main, []) == 2 and "--dry_run" in capsys.readouterr().err


def test_kernels_counts_what_runs_between_the_first_and_the_last():
    a = torch.ones(64, 64)

    def work():
        for _ in range(40):
            a @ a
            time.sleep(0.002)

    found = gpu.kernels(work, tiny_config())
    assert 20 <= found["launches"] <= 120 and found["busy"] < 0.6
    assert "aten::mm" in [name for name, _, _ in found["longest"]]


@pytest.mark.slow
def test_a_dry_run_passes_through_every_stage(tmp_path):
    command = [sys.executable, str(ROOT / "bench.py"), "gpu", "--dry_run", "--save"]
    assert subprocess.run([*command, str(tmp_path / "gpu.jsonl")]).returncode == 0
    records = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [record["stage"] for record in records] == ["machine", *gpu.STAGES]
    resumed = records[list(gpu.STAGES).index("resume") + 1]["results"]["resumed"]
    assert resumed["unlike"] == 0 < resumed["tensors"]
