"""Flags, files and presets: what the user sets wins, and every problem is named at once."""

import json
from dataclasses import fields, replace

import pytest
import torch

import config as settings
from config import FIELD_TYPES, GPT2_CONFIGS, GPT2Config
from utils import ArgumentParser

TEXTS = {  # a flag's text and the value that it must become, for each type of field
    int: ("7", 7),
    float: ("0.25", 0.25),
    str: ("a=b=c", "a=b=c"),
    bool: ("false", False),
}


def parse(*argv):
    parser = ArgumentParser(prog="train.py")
    settings.add_flags(parser)
    options = vars(parser.parse_args(argv))
    return settings.parse_values({n: options[n] for n in FIELD_TYPES if options[n] is not None})


def plain_type(kind):
    return next(t for t in (bool, int, float, str) if settings._is_a(TEXTS[t][1], kind))


@pytest.mark.parametrize("name", list(FIELD_TYPES))
@pytest.mark.parametrize("joined", [True, False])
def test_every_field_parses_from_the_command_line(name, joined):
    text, value = TEXTS[plain_type(FIELD_TYPES[name])]
    argv = [f"--{name}={text}"] if joined else [f"--{name}", text]
    assert parse(*argv) == ({name: value}, [])
    if settings._is_a(None, FIELD_TYPES[name]):
        assert parse(f"--{name}", "none") == ({name: None}, [])


def test_a_bare_bool_flag_means_true():
    assert parse("--compile")[0] == {"compile": True}
    assert parse("--compile", "--n_layer", "3")[0] == {"compile": True, "n_layer": 3}


def test_numbers_may_be_written_with_an_exponent():
    assert parse("--max_iters", "1e5", "--learning_rate", "6e-4")[0] == {
        "max_iters": 100_000,
        "learning_rate": 6e-4,
    }


@pytest.mark.parametrize(
    "values",
    [{"seed": 2**63}, {"peer_timeout": 1e300}, {"dtype": "float64", "device": "mps"}],
    ids=lambda values: "-".join(values),
)
def test_bad_input_beyond_what_torch_can_take_is_named(values):
    (line,) = settings.problems(GPT2Config(**values))
    assert line.startswith(f"--{next(iter(values))} ")


def test_bad_input_of_a_wrong_type_is_named():
    values, found = parse("--n_layer", "six", "--compile", "maybe", "--dropout", "none")
    assert values == {} and len(found) == 3
    assert "--n_layer six: must be a whole number" in found


def test_bad_input_all_problems_at_once():
    config = GPT2Config(n_embd=100, n_head=12, dropout=1.5, lr_decay_iters=10, beta1=-1)
    found = "\n".join(settings.problems(config))
    for part in ("--n_embd 100", "--n_head 12", "--dropout 1.5", "--lr_decay_iters 10", "--beta1"):
        assert part in found
    with pytest.raises(ValueError):
        settings.validate(config)


@pytest.mark.parametrize("name", ["n_layer", "learning_rate", "bias", "data_dir", "grad_clip"])
def test_bad_input_of_a_wrong_type_from_python_is_named(name):
    config = replace(GPT2Config(), **{name: [1]})
    assert any(line.startswith(f"--{name} ") for line in settings.problems(config))


def test_an_int_serves_as_a_float_but_a_bool_not_as_an_int():
    assert settings.problems(GPT2Config(dropout=0, learning_rate=1)) == []
    assert settings.problems(GPT2Config(n_layer=True)) != []


def test_shipped_defaults_are_valid_and_those_of_gpt2():
    assert settings.problems(GPT2Config()) == [] and settings.edited_fields() == set()
    for name in GPT2_CONFIGS:
        preset = settings.apply_preset(GPT2Config(), GPT2_CONFIGS[name], set())
        assert settings.problems(preset) == []
        for derived in ("min_lr", "warmup_iters", "lr_decay_iters", "dtype", "device", "compile"):
            assert derived not in GPT2_CONFIGS[name]


def test_an_edited_config_is_not_overridden_by_a_preset(monkeypatch):
    def edited(**defaults):
        monkeypatch.setattr(
            settings,
            "GPT2Config",
            settings.dataclass(
                type(
                    "E",
                    (GPT2Config,),
                    {"__annotations__": {name: FIELD_TYPES[name] for name in defaults}, **defaults},
                )
            ),
        )
        return settings.edited_fields()

    mine = edited(n_layer=5, compile=False)
    assert mine == {"n_layer", "compile"}
    name, values = settings.auto_preset("cpu", 1_000_000, 100_000, 65)
    config = settings.apply_preset(settings.GPT2Config(), values, mine)
    assert config.n_layer == 5 and config.n_embd == GPT2_CONFIGS[name]["n_embd"] != 768


@pytest.mark.parametrize("train, val", [(1_000_000, 100_000), (4_600, 510), (100, 20), (3, 2)])
def test_auto_preset_fits_the_splits(train, val):
    for device in ("cpu", "cuda", "mps"):
        _, values = settings.auto_preset(device, train, val, 65)
        config = settings.apply_preset(GPT2Config(), values, set())
        assert settings.problems(config) == []
        assert config.block_size + 1 <= min(train, val)


def test_auto_preset_picks_by_device_and_size():
    sizes = {"small": (1_000_000, 111_000, 65), "large": (9_000_000_000, 4_000_000, 50257)}
    assert settings.auto_preset("cpu", *sizes["small"])[0] == "shakespeare-cpu"
    assert settings.auto_preset("cpu", *sizes["large"])[0] == "shakespeare-cpu"
    assert settings.auto_preset("cuda", *sizes["small"])[0] == "shakespeare-gpu"
    assert settings.auto_preset("cuda", *sizes["large"])[0] == "gpt2"


def test_derived_values_follow_what_they_depend_on():
    config = settings.derived(GPT2Config(max_iters=500, learning_rate=1e-2))
    assert (config.warmup_iters, config.lr_decay_iters, config.min_lr) == (50, 500, 1e-3)
    assert settings.derived(GPT2Config(warmup_iters=7)).warmup_iters == 7


def test_a_written_config_is_a_valid_config_file(tmp_path):
    config = GPT2Config(n_layer=3, dtype=torch.float16, grad_clip=None)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings.to_dict(config)))
    values, found = settings.read_config_file(path)
    assert found == [] and set(values) == {field.name for field in fields(GPT2Config)}
    assert GPT2Config(**values) == replace(config, dtype="float16")


def test_bad_input_in_a_config_file_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"n_layers": 3}')
    assert "did you mean n_layer?" in settings.read_config_file(path)[1][0]
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        settings.read_config_file(path)


def test_every_field_has_a_comment_that_help_shows():
    assert set(settings._notes()) == {field.name for field in fields(GPT2Config)}


def test_a_checkpoint_without_a_newer_field_counts_as_having_what_ships():
    old = settings.to_dict(GPT2Config())
    del old["gelu"]
    assert settings.differences(old, GPT2Config()) == []
    assert settings.differences(old, GPT2Config(gelu="exact")) == [
        "gelu: checkpoint tanh, config exact"
    ]
