"""The benchmark measures what it says; how fast anything is, is not tested."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import bench_common as common
import bench_generate
import bench_gpu
import bench_prepare
import bench_to_loss
import bench_train
import pytest
import torch
from conftest import ROOT

import bench
from config import GPT2Config
from logger import run
from model import GPT2
from sampling import Sampling, generate_ids

SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 65, "block_size": 32}
TINY = GPT2Config(**SHAPE, batch_size=2, compile=False, device="cpu", dtype="float32")


def test_contenders_take_turns_after_a_warm_up_and_are_compared_in_a_table():
    turns = []
    one = lambda: turns.append("A") or (10, len(turns), 1234.5)  # noqa: E731
    other = lambda: turns.append("B") or (10, len(turns), None)  # noqa: E731
    results = common.take_turns({"A": one, "B": other}, common.InTurns(samples=2))
    assert sorted(turns[:2]) == ["A", "B"] and "".join(turns[2:]) == "ABAB"
    assert results["A"]["units"] == (10, 10) and results["A"]["seconds"] == (3, 5)
    table = common.table({"unit": "tokens", "most": 3e12, "results": results})
    assert [line.split() for line in table.splitlines()] == [
        ["tokens", "per_second", "first/this", "peak_mb"],
        ["A", "2.667", "1", "1,234"],  # the median of 10/3 and 10/5
        ["B", "2.083", "1.28", "n/a"],
        ["most", "3e+12"],
    ]


def test_shares_are_of_what_the_machine_does_at_most(monkeypatch):
    """100 tokens a second: 100 times a token's FLOPs; 50 times all weights, 2 streams at once."""

    def compare(contenders, options, limit):
        results = {name: {"per_second": 100.0} for name in contenders}
        return results | {common.LIMIT: {"per_second": limit()}}

    for script, limit in (bench_train, "gemm_flops"), (bench_generate, "read_bandwidth"):
        monkeypatch.setattr(script, "compare", compare)
        monkeypatch.setattr(script, limit, lambda config: 1e9)
    options, model = bench_generate.GenerateOptions(streams=2, ours_only=True), GPT2(TINY)
    training = bench_train.compare_training(bench_train.TrainOptions(), TINY)
    generating = bench_generate.compare_all(options, TINY)
    rows = (*training["results"].values(), *generating["results"].values())
    weights = model.num_params() - model.transformer.wpe.weight.numel()
    expected = [100 * model.flops_per_token() / 1e9, 50 * 4 * weights / 1e9, 50 * weights / 1e9]
    assert [row["utilisation"] for row in rows] == expected


def test_busy_processes_are_there_and_leave(monkeypatch):
    start, processes = subprocess.Popen, []
    monkeypatch.setattr(subprocess, "Popen", lambda c: processes.append(start(c)) or processes[-1])
    with common.spinning(2):
        assert [process.poll() for process in processes] == [None, None]
    assert all(process.poll() is not None for process in processes)


def test_transformers_and_ctranslate2_have_our_weights(monkeypatch):
    """Greedy, they give the tokens that ours gives."""
    pytest.importorskip("transformers")
    generator = pytest.importorskip("ctranslate2").Generator
    prompt, generate, made = list(range(10)), generator.generate_batch, []
    model, theirs = bench_generate.our_model(TINY, 1), bench_generate.transformers_model(TINY)
    ours = [token for [token] in generate_ids(model, [prompt], Sampling(8, temperature=0))]
    found = theirs.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
    assert found[0, 10:].tolist() == ours

    def greedy(*words, **how):
        made.extend(generate(*words, **how | {"sampling_topk": 1}))
        return made

    monkeypatch.setattr(generator, "generate_batch", greedy)
    options = bench_generate.GenerateOptions(new_tokens=8)
    bench_generate.ctranslate2_generating(options, TINY)()
    assert made[0].sequences_ids[0] == ours


def test_seconds_to_a_loss_are_those_of_the_first_evaluation_at_or_below_it(monkeypatch):
    def train(command):
        folder = Path(command[command.index("--log_dir") + 1], "a_run")
        folder.mkdir(parents=True)
        records = [{"seconds": s, "val_loss": v} for s, v in ((1, 2.5), (2, 1.9), (3, 1.95))]
        lines = [json.dumps(record) for record in [{"seconds": 0.5}, *records]]
        (folder / "metrics.jsonl").write_text("\n".join(lines))

    monkeypatch.setattr(subprocess, "call", train)
    for loss, seconds in [(1.9, "2"), (1.0, "n/a")]:
        report = bench_to_loss.race(bench_to_loss.LossOptions(loss=loss), TINY)
        assert common.table(report).split()[4:9] == ["ours", seconds, "3", "1.95", "loss"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["train", "generate --new_tokens 5 --busy 1"])
def test_a_table_and_then_one_line_of_json(flags, tmp_path, capsys):
    flags += "".join(f" --{name} {value}" for name, value in SHAPE.items())
    flags += f" --device cpu --samples 1 --save {tmp_path / 'r.json'}"
    assert run(bench.main, flags.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert report == json.loads((tmp_path / "r.json").read_text()) and len(lines) > 2
    for result in report["results"].values():
        assert result["seconds"][0] > 0 and result["utilisation"] > 0


def test_a_script_is_timed_as_a_whole_process():
    code = "import time; time.sleep(0.1)"
    units, seconds, peak_mb = bench_prepare.time_script(["-c", code], 3.0)
    assert units == 3.0 and 0.1 < seconds < 10 and 1 < peak_mb < 500
    with pytest.raises(ValueError, match="exit 3"):
        bench_prepare.time_script(["-c", "raise SystemExit(3)"], 3.0)


BAD = ["fly", "train --nanogpt nowhere", "generate --samples 0", "prepare --device abacus"]
BAD += ["plan --gpu h1000", "plan --gradient_accumulation_steps 12", "gpu --device cpu"]


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_of_the_benchmark_is_exit_2(capsys, flags):
    assert run(bench.main, flags.split()) == 2
    out, err = capsys.readouterr()
    assert err.count("error: ") == err.count("\n") == 1 and out == ""
    assert flags.split()[-1] in err


def test_a_stage_that_fails_is_a_line_and_the_next_is_appended(tmp_path, monkeypatch):
    def whole(options, config):
        return {"unit": "", "results": {"kept": {"lines": path.read_text().count("\n")}}}

    path, broken = tmp_path / "gpu.jsonl", Mock(side_effect=RuntimeError("no kernel\na long story"))
    monkeypatch.setattr(bench_gpu, "STAGES", {"broken": broken, "whole": whole})
    monkeypatch.setattr(common, "own_process", lambda: ThreadPoolExecutor(1))
    monkeypatch.setattr(bench_gpu, "prepare", Mock())
    path.write_text('{"stage": "earlier"}\n')
    assert run(bench.main, ["gpu", "--dry_run", "--save", str(path)]) == 1
    earlier, machine, first, second = map(json.loads, path.read_text().splitlines())
    assert (earlier["stage"], machine["stage"]) == ("earlier", "machine")
    assert first == {"stage": "broken", "error": "RuntimeError: no kernel"}
    assert second["results"]["kept"]["lines"] == 3


@pytest.mark.slow
def test_a_dry_run_passes_through_every_stage(tmp_path):
    command = [sys.executable, ROOT / "bench.py", "gpu", "--dry_run", "--save", tmp_path / "gpu"]
    assert subprocess.run(command).returncode == 0
    records = [json.loads(line) for line in (tmp_path / "gpu").read_text().splitlines()]
    assert [record["stage"] for record in records] == ["machine", *bench_gpu.STAGES]
    resumed = records[list(bench_gpu.STAGES).index("resume") + 1]["results"]["resumed"]
    assert resumed["unlike"] == 0 < resumed["tensors"]
