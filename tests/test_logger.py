"""What a person at 80 columns sees, what a file gets, exit codes, and that what is said is so."""

import errno
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pexpect
import pytest
from conftest import ROOT, TEXT

import logger
from files import WriteError
from logger import run

STYLE = re.compile(r"\033\[[\d;]*m")
CURSOR = re.compile(r"\033\[\??\d*[AKhl]")  # of a live line: up, erase, hide and show
SIZE = {"dimensions": (24, 80), "encoding": "utf-8", "timeout": 120}
PREAMBLE = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import logger
from logger import *
"""


def python(code, **environment):
    """The command that runs a snippet which has logger's names, and its environment."""
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "FORCE_COLOR")}
    return [sys.executable, "-c", PREAMBLE + code], {**kept, "TERM": "xterm", **environment}


def on_a_terminal(code, **environment):
    """What a snippet shows on a terminal of 80 columns."""
    (program, *words), environment = python(code, **environment)
    child = pexpect.spawn(program, words, env=environment, **SIZE)
    child.expect(pexpect.EOF)
    return child.before.replace("\r\n", "\n")


def piped(code, **environment):
    """What a snippet writes to stdout and to stderr where they are pipes."""
    command, environment = python(code, **environment)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return done.stdout, done.stderr


def frames(shown):
    """Every line that was there at some time, without styles."""
    return re.split(r"[\r\n]+", CURSOR.sub("", STYLE.sub("", shown)))


# ---------------------------------------------------------------- messages

LONG = "the quick brown fox `jumps over the lazy dog and goes on and on for ever` " + 80 * "x"
SAID = f"""
log_row("device", {LONG!r}, "green")
log("one\\ntwo")
warn("not so")
log_next("python train.py --prompt " + 70 * "y", "tensorboard")
log_row("done", "well", "bold", stdout)
log_next("next one", console=stdout)
"""


def test_a_terminal_gets_lines_folded_at_words_and_a_pipe_whole_ones():
    rest = f"one\ntwo\nwarning: not so\nnext       python train.py --prompt {70 * 'y'}\n"
    rest += "           tensorboard\n"
    out, err = piped(SAID, FORCE_COLOR="1")
    assert err == f"device     {LONG}\n{rest}"
    assert out == "done       well\nnext       next one\n"
    shown = on_a_terminal(SAID, NO_COLOR="1")
    folded = "device     the quick brown fox\n"
    folded += "           `jumps over the lazy dog and goes on and on for ever`\n"
    assert shown == f"{folded}           {80 * 'x'}\n{rest}{out}"


@pytest.mark.parametrize(
    "environment, is_styled",
    [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_only_a_terminal_that_wants_styles_gets_them(environment, is_styled):
    shown = on_a_terminal(SAID + 'show("bold", "bold")', **environment)
    assert STYLE.sub("", shown).endswith("bold") and bool(STYLE.search(shown)) is is_styled
    if is_styled:
        assert "\033[32mdevice     \033[0mthe quick" in shown and "\033[1mbold\033[0m" in shown


def test_control_characters_are_visible_on_a_terminal_and_results_untouched_in_a_pipe():
    code = r"""
show("a\x1b[31m\tb\x07\x9b\r\n")
show("c\x1b]0;d", "bold")
warn("e\x1b[2Jf")
run(lambda argv: open("g\x1b[2J"))
run(lambda argv: show("\udcff"))
"""
    shown = STYLE.sub("", on_a_terminal(code))
    assert "a\\x1b[31m\tb\\x07\\x9b\\x0d\nc\\x1b]0;d" in shown and "\033" not in shown
    assert "warning: e\\x1b[2Jf\nerror: g\\x1b[2J: No such file" in shown
    out, err = piped(code)
    assert out == "a\x1b[31m\tb\x07\x9b\nc\x1b]0;d\\udcff" and "\033" not in err


@pytest.mark.parametrize("total", [10, None])
def test_progress_of_long_work_is_a_line_now_and_then_in_a_file(total):
    code = f"""
def work():
    with progress("reading [/x].txt", {total}, "pages", 4) as advance:
        for _ in range(3):
            time.sleep(0.11)
            advance(2)
            log("between")
    log("after")
work()
logger.LINE_SECONDS = 0
work()
"""
    of = " of 10 pages, 0s left" if total else ""
    lines = [line for n in (6, 8, 10) for line in (f"reading [/x].txt: {n}{of}", "between")]
    assert piped(code)[1].splitlines() == [*3 * ["between"], "after", *lines, "after"]
    shown = on_a_terminal(code)
    assert max(map(len, frames(shown))) <= 80 and frames(shown).count("between") == 6
    assert any(re.search("^reading .* 8 (/ 10 )?pages", line) for line in frames(shown))
    last = shown.rsplit("reading", 1)[1]
    assert "\033[2K" in last and "after" in last  # the live line has gone


# ---------------------------------------------------------------- exit codes


class Stopped(Exception):
    exit_code = 143


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("--a 1: no\n--b 2: no"), 2, "error: --a 1: no\nerror: --b 2: no\n"),
        (ValueError(), 2, "error: ValueError\n"),
        (PermissionError(errno.EACCES, "Denied", "x"), 2, "error: x: Denied\n"),
        (WriteError("could not write x"), 4, "error: could not write x\n"),
        (OSError(errno.EIO, "Input/output error"), 4, "error: Input/output error\n"),
        (Stopped("SIGTERM after step 4"), 143, "SIGTERM after step 4\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=repr,
)
def test_an_error_is_an_exit_code_and_a_line_without_traceback(error, code, line, capsys):
    assert run(Mock(side_effect=error), []) == code and capsys.readouterr().err == line
    assert run(Mock(side_effect=error), ["--debug"]) == code
    assert ("Traceback" in capsys.readouterr().err) is (code != 130)


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run(Mock(side_effect=ZeroDivisionError), [])


def test_of_several_processes_one_says_what_all_have_met(monkeypatch, capsys):
    places = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    logger.log("a message")
    error = ValueError("an error")
    assert run(Mock(side_effect=error), []) == 2 and capsys.readouterr().err == ""
    error.rank_local = True
    assert run(Mock(side_effect=error), []) == 2
    assert capsys.readouterr().err == "process 1: error: an error\n"


@pytest.mark.parametrize(
    "shell, lines",
    [
        ("{} | head -n 1", 1),  # the reader has what it wants
        ("{} >&-", 0),
        ("{} 2>&-", 5000),
        ("{} 2> >(exit 0)", 5000),  # work goes on without messages
    ],
)
def test_streams_that_are_closed_are_no_error(shell, lines):
    command, environment = python("""
def main(argv):
    assert not sys.stdout.isatty() and not sys.stderr.isatty()
    for _ in range(5000):
        show("line\\n")
        log("message")
sys.exit(run(main))
""")
    script = shell.format(shlex.join(command)) + "; exit ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == lines * "line\n"
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- what to type next


def test_what_to_type_for_this_python_depends_on_the_path(tmp_path, monkeypatch):
    python = tmp_path / "my venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", str(python.parent))
    assert logger.command_for("train.py").startswith("python ")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert logger.command_for("train.py").startswith("'my venv/bin/python' /")
    monkeypatch.chdir(ROOT)
    assert logger.command_for("train.py", "--fresh") == f"'{python}' train.py --fresh"


def test_a_newcomer_s_session_fits_into_80_columns_and_each_next_command_works(tmp_path):
    """prepare, train, evaluate and generate in a shell, typed as the line before has said."""
    (tmp_path / "my novel.txt").write_text(TEXT, "utf-8")
    flags = " --max_iters 6 --eval_interval 3 --eval_iters 1 --log_interval 1 --block_size 8"
    flags += " --n_layer 1 --n_head 1 --n_embd 8 --device cpu"
    environment = python("")[1] | {"PS1": "$ ", "OMP_NUM_THREADS": "1"}
    where = {"env": environment, "cwd": str(tmp_path), "echo": False}
    shell = pexpect.spawn("bash", ["--norc", "--noediting"], **where, **SIZE)

    def typed(line, prompt="$ "):
        shell.sendline(line)
        shell.expect_exact(prompt)
        shown = shell.before.replace("\r\n", "\n")
        wide = [x for x in frames(shown) if len(x) > 80 and ".py" not in x and "venv" not in x]
        assert wide == [] and STYLE.search(shown) and "Traceback" not in shown
        commands = STYLE.sub("", shown).rpartition("next       ")[2]
        return frames(shown), [line.strip() for line in commands.splitlines()]

    shell.expect_exact("$ ")
    prepare = shlex.join([sys.executable, str(ROOT / "prepare_data.py"), "--input", "my novel.txt"])
    _, (train,) = typed(f"{prepare} --tokenizer char --data_dir 'my data'")
    lines, (generate, watch) = typed(train + flags)
    labels = ("preset", "device", "model", "data", "training", "optimizer", "done", "best")
    assert set(labels) <= {line[:11].strip() for line in lines}
    assert any(re.match(r"step \d/6 .* left, loss \d", line) for line in lines)
    assert any(re.match(r"step 6/6: loss .*, val loss", line) for line in lines)
    assert watch.split()[-2:] == ["--logdir", "runs"] and Path(shlex.split(watch)[0]).name
    typed(f"{sys.executable} {ROOT / 'evaluate.py'}")
    typed(generate, "> ")
    shell.sendline("the fox")
    shell.expect_exact("\033[1mthe fox\033[0m")  # the prompt stands out from its continuation
    shell.expect_exact("> ")
    shell.sendline("/quit")
    shell.expect_exact("$ ")
    shell.sendline("exit $?")
    shell.expect(pexpect.EOF)
    shell.close()
    assert shell.exitstatus == 0


def test_two_runs_that_start_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "2026-01-01_00-00-00")
    for checkpoint_dir in ("a", "b"):
        with logger.open_run(tmp_path, tmp_path / checkpoint_dir, None, 0) as (name, records):
            assert records == []
    assert sorted(os.listdir(tmp_path)) == ["2026-01-01_00-00-00", name] and name.endswith("_")
