"""The terminal: what a person at 80 columns sees, what a file gets, and that what is said is so."""

import fcntl
import io
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import traceback
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import TEXT

import bench
import checkpoint
import convert
import evaluate
import generate
import prepare_data
import train
import utils
from config import GPT2Config
from utils import laid_out, live_line, run, styled

STYLE = re.compile(r"\033\[\d+m")
HELP = {  # what --help is asked of: the function that parses, and the words before the flag
    "prepare_data": (prepare_data.parse, []),
    "train": (train.parse, []),
    "generate": (generate.parse, []),
    "evaluate": (evaluate.parse, []),
    "convert": (convert.parse, []),
    "convert from_hf": (convert.parse, ["from_hf"]),
    "convert to_hf": (convert.parse, ["to_hf"]),
    "convert from_nanogpt": (convert.parse, ["from_nanogpt"]),
    "bench": (bench.parse, []),
    "bench plan": (bench.plan_arguments, []),
}


def on_a_terminal(function, *arguments, typed="", **environment):
    """Exit code of a function in a forked child on a terminal of 80 columns, and what it showed."""
    pid, terminal = pty.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(60)
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
            os.environ.pop("COLUMNS", None)
            os.environ.pop("NO_COLOR", None)
            os.environ.update({"TERM": "xterm", **environment})
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
            code = function(*arguments)
        except BaseException:  # the child must never return into pytest
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    shown = b""
    while select.select([terminal], [], [], 60)[0]:
        try:
            part = os.read(terminal, 1 << 16)
        except OSError:  # Linux's way to say that the child has left
            break
        shown += part
        if typed and shown.endswith(b"> "):
            line, _, typed = typed.partition("\n")
            os.write(terminal, f"{line}\n".encode())
        if not part:
            break
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode().replace("\r\n", "\n")


def frames(shown):
    """Every line that was there at some time, without styles."""
    return re.split(r"[\r\n]+", STYLE.sub("", shown))


def commands(shown):
    """The commands of the last `next` in what a script has shown."""
    _, found = STYLE.sub("", shown).rsplit("next       ", 1)
    first, *more = found.splitlines()
    return [first, *(line.strip() for line in more if line.startswith(" " * utils.LABEL))]


def run_as_told(line, *more):
    """Run a command that a script has shown: here, once it is sure that a shell would find it."""
    python, script, *words = shlex.split(line)
    assert Path(shutil.which(python)).absolute() == Path(sys.executable)
    main = {"train.py": train, "generate.py": generate}[Path(script).name].main
    assert Path(script).samefile(Path(utils.__file__).with_name(Path(script).name))
    return run(main, [*words, *more])


@pytest.fixture
def here(tmp_path, monkeypatch, char_data):
    """A folder with a text, a data set `data` and flags for a short run on it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "novel.txt").write_text(TEXT, "utf-8")
    words = "--data_dir data --max_iters 6 --eval_interval 3 --eval_iters 1 --log_interval 1"
    return f"{words} --block_size 8 --n_layer 1 --n_head 1 --n_embd 8 --device cpu".split()


# ---------------------------------------------------------------- styles and lines


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, "\033[1mx\033[0m"),
        ({"NO_COLOR": ""}, "\033[1mx\033[0m"),
        ({"NO_COLOR": "1"}, "x"),
        ({"TERM": "dumb"}, "x"),
    ],
)
def test_only_a_terminal_that_wants_styles_gets_them(monkeypatch, environment, expected):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    master, slave = pty.openpty()
    with open(slave, "w") as terminal:
        assert styled("x", "bold", terminal) == expected
    os.close(master)
    assert styled("x", "bold", io.StringIO()) == "x"


def test_a_terminal_gets_lines_folded_at_words_and_a_file_whole_ones(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "30")
    stream = io.StringIO()
    text = "the quick brown fox `jumps over the` lazy dog " + 30 * "x"
    assert laid_out(text, "label  ", stream=stream) == f"label  {text}"
    stream.isatty = lambda: True
    assert laid_out(text, "label  ", stream=stream).splitlines() == [
        "label  the quick brown fox",
        "       `jumps over the` lazy",
        "       dog",
        "       " + 30 * "x",
    ]


@pytest.mark.parametrize("total", [10, None])
def test_progress_of_long_work_is_a_line_now_and_then_in_a_file(monkeypatch, capsys, total):
    def work():
        with live_line("reading", total, "page", 4) as advance:
            for _ in range(3):
                advance(2)

    work()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(utils, "LINE_SECONDS", 0)
    work()
    lines = capsys.readouterr().err.splitlines()
    of = " of 10 page, 0s left" if total else ""
    assert lines == [f"reading: 6{of}", f"reading: 8{of}", f"reading: 10{of}"]


# ---------------------------------------------------------------- the scripts on a terminal


def test_training_fits_into_80_columns_and_uses_styles_unless_no_color_is_set(here):
    code, shown = on_a_terminal(run, train.main, here)
    assert code == 0 and STYLE.search(shown) and "\033" not in STYLE.sub("", shown)
    assert [line for line in frames(shown) if len(line) > 79 and ".py" not in line] == []
    assert "step 6/6 |" in shown and "\rstep 6/6" not in shown.split("done")[1]  # the bar has gone
    code, plain = on_a_terminal(run, train.main, [*here, "--fresh"], NO_COLOR="1")
    assert code == 0 and "\033" not in plain
    for word in ("device", "model", "data", "training", "optimizer", "done", "best", "curves"):
        assert any(line.startswith(f"{word} ") for line in frames(plain)), word


def test_training_into_a_file_leaves_no_escape_codes_and_no_bars(here, capfd):
    assert run(train.main, here) == 0
    err = capfd.readouterr().err
    assert "\033" not in err and "\r" not in err and "|" not in err
    steps = [line for line in err.splitlines() if line.startswith("step ")]
    assert sum(re.match(r"step \d/6: loss \d", line) is not None for line in steps) == 6
    assert [line for line in steps if "val loss" in line] == steps[3::4]  # after steps 3 and 6
    assert [line for line in err.splitlines() if len(line) > 79 and ".py" not in line] == []


def test_an_error_stands_on_a_line_of_its_own_red_and_folded(here, monkeypatch):
    batch = train.Trainer.forward_backward

    def poisoned(self, micro_step):
        return batch(self, micro_step) * (torch.nan if self.step == 4 else 1)

    monkeypatch.setattr(train.Trainer, "forward_backward", poisoned)
    code, shown = on_a_terminal(run, train.main, here)
    assert code == 5 and re.search("[\r\n]\033\\[31merror: \033\\[0mloss or gradient", shown)
    assert max(map(len, frames(shown))) <= 79


def test_preparing_and_evaluating_fit_into_80_columns(here):
    flags = ["--input", "novel.txt", "--tokenizer", "char", "--data_dir", "novel"]
    for main, words in ((prepare_data.main, flags), (train.main, here), (evaluate.main, [])):
        code, shown = on_a_terminal(run, main, words)
        assert code == 0 and "next" in shown
        assert [line for line in frames(shown) if len(line) > 79 and ".py" not in line] == []


def test_an_interactive_prompt_stands_out_from_its_continuation(here):
    assert run(train.main, here) == 0
    words = ["--interactive", "--max_new_tokens", "5"]
    code, shown = on_a_terminal(run, generate.main, words, typed="the fox\n/show\n/set x\n/quit\n")
    assert code == 0 and "\n\033[1mthe fox\033[0m" in shown
    for word in ("step 6", "parameters", "/help", "temperature     0.8", "error: "):
        assert word in STYLE.sub("", shown)
    assert max(map(len, frames(shown))) <= 79


# ---------------------------------------------------------------- what to type next


def test_the_commands_that_scripts_end_with_work(here, capfd):
    text = ["--input", "novel.txt", "--tokenizer", "char", "--data_dir", "my novel"]
    assert run(prepare_data.main, text) == 0
    (line,) = commands(capfd.readouterr().out)
    flags = [*here[2:], "--checkpoint_dir", "my run", "--log_dir", "my logs"]
    assert run_as_told(line, *flags) == 0
    generating, watching = commands(capfd.readouterr().err)
    tensorboard, flag, folder = shlex.split(watching)
    assert shutil.which(tensorboard) and flag == "--logdir" and list(Path(folder).glob("*/events*"))
    done = subprocess.run(generating, shell=True, input="the\n", capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("the"), done.stderr
    assert run(convert.main, ["to_hf", "my run/best_checkpoint.pt", "out"]) == 0
    (line,) = commands(capfd.readouterr().err)
    assert run_as_told(line.replace("--interactive", "--prompt the")) == 0
    assert capfd.readouterr().out.startswith("the")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_stream_that_was_closed_before_the_start_is_no_error(stream, monkeypatch):
    """Python has None for it (`python generate.py >&-`)."""
    monkeypatch.setattr(sys, stream, None)

    def main(argv):
        getattr(sys, stream).write(f"{getattr(sys, stream).isatty()}")

    assert run(main, []) == 0


def test_an_interrupted_run_says_how_to_go_on_and_a_finished_one_too(here, monkeypatch, capfd):
    update = train.Trainer.update

    def interrupted(self):
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self)

    flags = [*here, "--fresh", "--checkpoint_dir", "my run"]
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "update", interrupted)
        assert run(train.main, flags) == 130
    err = capfd.readouterr().err
    (line,) = commands(err)
    assert "SIGINT after step 4 of 6; saved in my run/checkpoint.pt" in err
    assert "--fresh" not in line and run_as_told(line) == 0
    assert checkpoint.load("my run/final_checkpoint.pt")["step"] == 6
    capfd.readouterr()
    assert run_as_told(line) == 0
    err = capfd.readouterr().err
    assert "finished" in err and "--max_iters 100 trains it for longer" in err
    assert "--interactive" in commands(err)[0]


@pytest.mark.parametrize("name", [None, "cuda", "cuda:2"])
def test_bad_input_more_processes_than_gpus_is_one_line(monkeypatch, name):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"--device cuda:2: .* shows 2"):
        utils.pick_device(name)


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 3090", 71e12),
    ],
)
def test_the_peak_of_a_similar_gpu_is_not_taken_for_its_own(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert utils.peak_flops(torch.device("cuda"), "bfloat16") == peak


def test_two_runs_that_start_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(utils.time, "strftime", lambda form: "2026-01-01_00-00-00")
    one, other = (utils.RunLog(str(tmp_path), None, {}, step=0) for _ in range(2))
    assert one.folder != other.folder


def test_what_to_type_for_this_python_depends_on_the_path(tmp_path, monkeypatch):
    scripts = tmp_path / "my venv" / "bin"
    scripts.mkdir(parents=True)
    for name in ("python", "tensorboard"):
        (scripts / name).touch(0o755)
    monkeypatch.setattr(sys, "executable", str(scripts / "python"))
    monkeypatch.setenv("PATH", str(scripts))
    assert utils.program() == "python" and utils.program("tensorboard") == "tensorboard"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert utils.program() == str(scripts / "python")
    monkeypatch.chdir(tmp_path)
    assert utils.command_for("train.py").startswith("'my venv/bin/python' /")
    monkeypatch.chdir(Path(utils.__file__).parent)
    assert utils.command_for("train.py", "--fresh").endswith("python' train.py --fresh")


# ---------------------------------------------------------------- --help


def help_of(name, monkeypatch):
    parse, words = HELP[name]
    monkeypatch.setenv("COLUMNS", "80")
    with redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
        parse([*words, "--help"])
    return text.getvalue()


@pytest.mark.parametrize("name", HELP)
def test_help_fits_into_80_columns_and_says_what_kind_of_value_a_flag_takes(name, monkeypatch):
    text = help_of(name, monkeypatch)
    assert max(map(len, text.splitlines())) <= 79
    shouted = re.findall(r"^  --(\w+) ([A-Z_]+)$|^  --(\w+) ([A-Z_]+)  ", text, re.MULTILINE)
    kinds = {kind for found in shouted for kind in (found[1], found[3]) if kind}
    assert kinds <= {"N", "X", "F", "DIR", "FILE", "PATH", "TEXT", "NAME", "KIND", "MODEL", "TASK"}


@pytest.mark.parametrize(
    "name", ["prepare_data", "train", "generate", "evaluate", "convert", "bench"]
)
def test_examples_of_help_are_understood(name, tmp_path, monkeypatch):
    (tmp_path / "nanoGPT").mkdir()
    for path in ("novel.txt", "nanoGPT/model.py"):
        (tmp_path / path).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    _, examples = help_of(name, monkeypatch).split("examples:\n")
    examples = [shlex.split(line, comments=True) for line in examples.splitlines()]
    assert len(examples) >= 3
    for words in examples:
        words = words[words.index(f"{name}.py") + 1 :]
        is_plan = words[:1] == ["plan"]
        (bench.plan_arguments if is_plan else HELP[name][0])(words[1:] if is_plan else words)


def test_help_of_training_has_every_field_in_its_group_with_its_default(monkeypatch):
    text = help_of("train", monkeypatch)
    groups = dict(re.findall(r"^(\w.*):\n((?:  .*\n)+)", text, re.MULTILINE))
    wanted = {
        "model": "n_embd",
        "data": "data_dir",
        "batch": "max_iters",
        "optimizer and schedule": "grad_clip",
        "precision and hardware": "compile",
        "evaluation": "patience",
        "checkpoints and logging": "log_dir",
    }
    for title, name in wanted.items():
        assert f"  --{name} " in groups[title], title
    of_fields = "".join(text for title, text in groups.items() if title in {*wanted, "preset"})
    shown = re.findall(r"--(\w+) (.*?\(default:\s+[^)]+\))", of_fields, re.DOTALL)
    assert [name for name, _ in shown] == [field.name for field in fields(GPT2Config)]
    shown = {name: " ".join(words.split()) for name, words in shown}
    assert shown["n_layer"] == "N transformer blocks (default: 12)"
    assert shown["min_lr"].endswith("(default: learning_rate / 10)")
    assert shown["grad_clip"].startswith("X ") and shown["bias"].startswith("[{true,false}] ")
