"""Presets and limits: what the user sets wins, and every problem is named at once."""

import json
from dataclasses import asdict, dataclass

import pytest
import torch

import config as settings
from config import GPT2_CONFIGS, GPT2Config, apply_preset, auto_preset, derived, differences
from files import read_json
from options import named, problems, validate


def test_shipped_defaults_are_valid_and_those_of_gpt2():
    assert problems(GPT2Config()) == [] and settings.edited_fields() == set()
    unset = {"min_lr", "warmup_iters", "lr_decay_iters", "dtype", "device", "compile"}
    for values in GPT2_CONFIGS.values():
        assert problems(apply_preset(GPT2Config(), values, set())) == []
        assert not unset & values.keys() and values.keys() <= GPT2_CONFIGS["gpt2"].keys()


def test_every_problem_is_named_at_once():
    wrong = {"n_layer": "six", "dropout": 1.5, "learning_rate": -1, "min_lr": 1, "beta1": -1}
    with pytest.raises(ValueError) as caught:
        validate(GPT2Config(n_embd=100, lr_decay_iters=10, **wrong))
    assert str(caught.value).splitlines() == [
        "--n_layer six: must be a valid integer",
        "--dropout 1.5: must be less than 1",
        "--learning_rate -1: must be greater than 0",
        "--beta1 -1: must be at least 0",
        "--n_embd 100: not divisible by --n_head 12",
        "--lr_decay_iters 10: less than --warmup_iters 2000",
    ]


@pytest.mark.parametrize(
    "values",
    [
        {"seed": 2**63},
        {"min_lr": 1.0},
        {"dtype": "float64", "device": "mps"},
        {"dtype": torch.float16, "parallel": "fsdp"},
        {"dtype": torch.int8},
        {"preset": "gpt3"},
        {"n_layer": True},
        {"position": "rope", "n_embd": 12 * 63},
        *({name: [1]} for name in ("n_layer", "learning_rate", "bias", "data_dir", "grad_clip")),
    ],
    ids="-".join,
)
def test_bad_input_is_named_once(values):
    (problem,) = problems(GPT2Config(**values))
    assert problem.startswith(f"--{next(iter(values))} ") and set(values) <= named(problem)


def test_an_edited_default_wins_over_a_preset(monkeypatch):
    @dataclass
    class Edited(GPT2Config):
        n_layer: int = 5
        position: str = "rope"

    monkeypatch.setattr(settings, "GPT2Config", Edited)
    assert settings.edited_fields() == {"n_layer", "position"}
    name, values = auto_preset("cpu", 1_000_000, 100_000, 65)
    config = apply_preset(Edited(), values, settings.edited_fields())
    assert config.n_layer == 5 and config.n_embd == GPT2_CONFIGS[name]["n_embd"] != 768


@pytest.mark.parametrize("train, val", [(10**10, 10**6), (4_600, 510), (100, 20), (3, 2)])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_presets_fit_device_splits_and_processes(device, train, val):
    fit = "shakespeare-cpu" if device != "cuda" else "gpt2" if train > 10**9 else "shakespeare-gpu"
    for processes in (1, 2, 3):
        picked, values = auto_preset(device, train, val, 65, processes)
        name, tuned = auto_preset(device, train, val, 65, processes, trained_block_size=1024)
        for config in (apply_preset(GPT2Config(), v, set()) for v in (values, tuned)):
            assert problems(config) == [] and config.block_size + 1 <= min(train, val)
            assert config.gradient_accumulation_steps % processes == 0
        sequences = tuned["batch_size"] * tuned["gradient_accumulation_steps"]
        assert (picked, name) == (fit, "finetune") and 12 <= sequences <= 16


def test_derived_values_follow_what_they_depend_on():
    config = derived(GPT2Config(max_iters=500, learning_rate=1e-2))
    assert (config.warmup_iters, config.lr_decay_iters, config.min_lr) == (50, 500, 1e-3)
    assert derived(GPT2Config(warmup_iters=7)).warmup_iters == 7


def test_a_written_config_is_a_valid_config_file(tmp_path):
    config = validate(GPT2Config(n_layer=3, dtype=torch.float16, grad_clip=None, learning_rate=1))
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)))
    read = validate(GPT2Config(**read_json(tmp_path / "config.json")))
    assert read == config and read.dtype == "float16" and type(read.learning_rate) is float


def test_a_checkpoint_without_a_newer_field_counts_as_having_what_ships():
    old = asdict(GPT2Config())
    del old["gelu"]
    assert differences(old, GPT2Config()) == []
    assert differences(old, GPT2Config(gelu="exact")) == ["gelu: checkpoint tanh, config exact"]
