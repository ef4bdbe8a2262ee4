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


def python(code, **environment):
    """The command that runs a snippet which has logger's names, and its environment."""
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "FORCE_COLOR")}
    kept |= {"TERM": "xterm", "PYTHONPATH": str(ROOT)}
    code = f"import os, sys, time, logger\nfrom logger import *\n{code}"
    return [sys.executable, "-c", code], kept | environment


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


LONG = "the quick brown fox `jumps over the lazy dog and goes on and on for ever` " + 80 * "x"
SAID = f"""
log_row("device", {LONG!r}, "green")
log("one\\ntwo")
warn("not so")
log_row("next", "python train.py --prompt " + 70 * "y" + "\\ntensorboard", fold=False)
log_row("done", "well", "bold", stdout)
log_row("next", "next one", console=stdout, fold=False)
"""
REST = f"one\ntwo\nwarning: not so\nnext       python train.py --prompt {70 * 'y'}\n"
REST += "           tensorboard\n"
OUT = "done       well\nnext       next one\n"


@pytest.mark.parametrize("setting, styles", [("NO_COLOR=", 2), ("NO_COLOR=1", 1), ("TERM=dumb", 0)])
def test_a_pipe_gets_whole_lines_a_terminal_folded_and_styled_ones(setting, styles):
    assert piped(SAID, FORCE_COLOR="1") == (OUT, f"device     {LONG}\n{REST}")
    shown = on_a_terminal(SAID + 'show("bold", "bold")', **dict([setting.split("=")]))
    folded = "device     the quick brown fox\n"
    folded += "           `jumps over the lazy dog and goes on and on for ever`\n"
    assert STYLE.sub("", shown) == f"{folded}           {80 * 'x'}\n{REST}{OUT}bold"
    found = ["\033[1mbold\033[0m" in shown, "\033[32mdevice     \033[0mthe quick" in shown]
    assert sum(found) == styles and bool(STYLE.search(shown)) is (styles > 0)


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
    of = " / 10 pages" if total else " pages"
    lines = [line for n in (6, 8, 10) for line in (f"reading [/x].txt: {n}{of}", "between")]
    assert piped(code)[1].splitlines() == [*3 * ["between"], "after", *lines, "after"]
    shown = on_a_terminal(code)
    assert max(map(len, frames(shown))) in (77, 78) and frames(shown).count("between") == 6
    assert any(re.search("^reading .* 8 (/ 10 )?pages", line) for line in frames(shown))
    assert re.search(r"\033\[2K.*after", shown.rsplit("reading", 1)[1], re.DOTALL)  # it has gone


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("--a 1: no\n--b 2: no"), 2, "error: --a 1: no\nerror: --b 2: no\n"),
        (ValueError(), 2, "error: ValueError\n"),
        (PermissionError(errno.EACCES, "Denied", "x"), 2, "error: x: Denied\n"),
        (WriteError("could not write x"), 4, "error: could not write x\n"),
        (OSError(errno.EIO, "Broken"), 4, "error: [Errno 5] Broken\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=repr,
)
def test_an_error_is_an_exit_code_and_a_line_without_traceback(error, code, line, capsys):
    assert run(Mock(side_effect=error), []) == code and capsys.readouterr().err == line
    assert run(Mock(side_effect=error), ["--debug"]) == code
    assert ("Traceback" in capsys.readouterr().err) is (code != 130)
    with pytest.raises(ZeroDivisionError):  # a bug is not hidden
        run(Mock(side_effect=ZeroDivisionError), [])


def test_of_several_processes_one_says_what_all_have_met(monkeypatch, capsys):
    for place in ("RANK=1", "LOCAL_RANK=1", "WORLD_SIZE=2", "TORCHELASTIC_RUN_ID=none"):
        monkeypatch.setenv(*place.split("="))
    main = Mock(side_effect=ValueError("an error"))
    assert run(main, []) == 2 and capsys.readouterr().err == ""
    main.side_effect.rank_local = True
    assert run(main, []) == 2 and capsys.readouterr().err == "process 1: error: an error\n"


# how a stream is closed, and how many lines arrive; work goes on without messages
CLOSED = {"| head -n 1": 1, ">&-": 0, "2>&-": 5000, "2> >(exit 0)": 5000}


@pytest.mark.parametrize("shell", CLOSED)
def test_streams_that_are_closed_are_no_error(shell):
    command, environment = python("""
def main(argv):
    assert not sys.stdout.isatty() and not sys.stderr.isatty()
    for _ in range(5000):
        show("line\\n")
        log("message")
sys.exit(run(main))
""")
    script = f"{shlex.join(command)} {shell}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == CLOSED[shell] * "line\n"
    assert "Traceback" not in done.stderr


def test_what_to_type_for_this_python_depends_on_the_path(tmp_path, monkeypatch):
    python = tmp_path / "my venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    for path, here, command in (
        (python.parent, ROOT, "python train.py"),
        (tmp_path, tmp_path, f"'my venv/bin/python' {shlex.quote(str(ROOT / 'train.py'))}"),
        (tmp_path, ROOT, f"'{python}' train.py"),
    ):
        monkeypatch.setenv("PATH", str(path))
        monkeypatch.chdir(here)
        assert logger.command_for("train.py", "--fresh") == f"{command} --fresh"


def test_a_newcomer_s_session_fits_into_80_columns_and_each_next_command_works(tmp_path):
    """Typed in a shell as the line before has said."""
    (tmp_path / "my novel.txt").write_text(TEXT, "utf-8")
    flags = " --max_iters 6 --eval_interval 3 --eval_iters 1 --log_interval 1 --block_size 8"
    flags += " --n_layer 1 --n_head 1 --n_embd 8 --device cpu"
    where = {"env": python("", PS1="$ ", OMP_NUM_THREADS="1")[1], "cwd": str(tmp_path)}
    shell = pexpect.spawn("bash", ["--norc", "--noediting"], echo=False, **where, **SIZE)

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
    labels = "preset device model data training optimizer done best"
    assert set(labels.split()) <= {line[:11].strip() for line in lines}
    for line in (r"step \d/6 .* left, loss \d", r"step 6/6: loss .*, val loss"):
        assert any(re.match(line, shown) for shown in lines)
    assert watch.split()[-2:] == ["--logdir", "runs"] and Path(shlex.split(watch)[0]).name
    typed(f"{sys.executable} {ROOT / 'evaluate.py'}")
    typed(generate, "> ")
    shell.sendline("the fox")
    shell.expect_exact("\033[1mthe fox\033[0m")  # the prompt stands out from its continuation
    shell.expect_exact("> ")
    shell.sendline("/quit")
    shell.expect_exact("$ ")
    shell.sendline("exit $?")
    assert shell.wait() == 0


def test_two_runs_that_start_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "2026-01-01_00-00-00")
    for checkpoint_dir in ("a", "b"):
        with logger.open_run(tmp_path, tmp_path / checkpoint_dir, None, 0) as (name, records):
            assert records == []
    assert sorted(os.listdir(tmp_path)) == ["2026-01-01_00-00-00", name] and name.endswith("_")
