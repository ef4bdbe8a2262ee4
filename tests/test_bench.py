"""The benchmark measures what it says; how fast anything is, is not tested."""

import json

import pytest

import bench
from utils import run

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


def test_bad_input_of_the_benchmark_is_exit_2(tmp_path, capsys):
    assert run(bench.main, ["train", "--nanogpt", str(tmp_path)]) == 2
    assert run(bench.main, ["train", "--samples", "0"]) == 2
    assert capsys.readouterr().err.count("error: ") == 2
