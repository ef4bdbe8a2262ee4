"""What a person reads: results on stdout, rank 0's messages on stderr, exit codes, a run's log."""

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
import traceback
from pathlib import Path
from typing import Annotated

from pydantic import Field, FiniteFloat
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TimeRemainingColumn
from rich.text import Text
from typing_extensions import TypedDict

import files

LINE_SECONDS = 30  # between two lines of progress without a terminal
INPUT_ERRORS = ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError
ESCAPES = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}


class _Console(Console):
    """rich's console, for our streams."""

    @property
    def is_terminal(self):  # whatever FORCE_COLOR says: a file gets no escape codes
        return self.file.isatty()

    @property
    def size(self):  # two columns less: a terminal puts ^C after a live line
        return super().size._replace(width=super().size.width - 2)

    def on_broken_pipe(self):  # rich would exit; the work goes on without output
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


stdout, stderr = (_Console(stderr=s, force_jupyter=False, highlight=False) for s in (False, True))


def rank() -> int:
    """Which of the processes that torchrun started this is; 0 if there is only one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_torchrun_variables():
    """ValueError if torchrun's variables are set, but not by torchrun; unsets them."""
    names = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ]
    if names and "TORCHELASTIC_RUN_ID" not in os.environ:
        shown = " ".join(f"{name}={os.environ.pop(name)[:60]}" for name in names)
        raise ValueError(f"{shown}: not set by torchrun; `unset {' '.join(names)}`")


# ---------------------------------------------------------------- messages


def log(text="", label="", style="", console=stderr, fold=True, every_rank=False):
    """Rank 0's message after a styled label; wrapped on a terminal, but never in a `command`."""
    if rank() > 0 and not every_rank:
        return
    lines = [line[:4000] for line in visible(text).split("\n")[:100]]  # they may be a file's
    if fold and console.is_terminal:
        width = max(20, console.width - len(label))
        wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
        wrapper.wordsep_simple_re = re.compile(r"(`.*?`|\s+)")  # a `command` is one word
        lines = [part for line in lines for part in wrapper.wrap(line) or [""]]
    text = f"\n{' ' * len(label)}".join(lines)
    console.print(Text.assemble((label, style), (text, "" if fold else "bold")), soft_wrap=True)


def log_row(label: str, text: str, style: str = "dim", console=stderr, fold=True):
    """`label      text`; fold=False: commands to paste. On stdout if they are results."""
    log(text, f"{label:<10} ", style, console, fold)


def warn(message: str):
    """Log a warning."""
    log(message, "warning: ", "yellow")


def visible(text: str) -> str:
    """text with terminal control characters escaped: \\x1b."""
    return text.translate(ESCAPES)


def show(text: str, style: str = ""):
    """Write text to stdout at once; on a terminal with control characters escaped."""
    if style and stdout.is_terminal:
        stdout.print(Text(visible(text), style), end="", soft_wrap=True)
    else:
        print(visible(text) if stdout.is_terminal else text, end="", flush=True)


def command_for(script: str, *words) -> str:
    """The command that runs one of our scripts from the current folder with this Python."""
    paths = Path(sys.executable), Path(__file__).with_name(script)
    return quoted(*map(from_here, paths), *words)


def quoted(*words) -> str:
    """Words as a command line, quoted for this system's shell."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(map(str, words))


def from_here(path: Path):
    """path as typed: relative to the current folder, or its name alone if that is on PATH."""
    if shutil.which(path.name) == str(path) or not path.exists():
        return path.name.removesuffix(".exe")
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def human_time(seconds: float) -> str:
    """92 -> '1m32s'."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def perplexity(loss: float) -> float:
    """exp of a loss in nats; infinite if it overflows."""
    return math.exp(loss) if loss < 700 else math.inf


@contextlib.contextmanager
def progress(label: str, total: int | None, unit: str, done: int = 0):
    """Yield a function to report progress to: a live line, or a line every LINE_SECONDS."""
    shown = time.monotonic()
    count = "{task.completed:,.0f}" + (" / {task.total:,.0f}" if total else "") + f" {unit}"
    with _live("{task.description}", BarColumn(None), count, TimeRemainingColumn()) as bar:
        bar.add_task(escape(visible(label)), total=total, completed=done)
        (task,) = bar.tasks

        def advance(amount):
            nonlocal shown
            bar.advance(task.id, amount)
            if bar.disable and time.monotonic() - shown >= LINE_SECONDS:
                shown = time.monotonic()
                log(f"{label}: {count.format(task=task)}")

        yield advance


def _live(*columns):
    """A live line on stderr, which estimates the time left from the last 1,000 updates."""
    settings = {"console": stderr, "transient": True, "speed_estimate_period": 1e9}
    settings |= {"redirect_stdout": False, "redirect_stderr": False}
    return Progress(*columns, disable=rank() > 0 or not stderr.is_terminal, **settings)


# ---------------------------------------------------------------- exit codes


def run(main, argv=None) -> int:
    """A script's main; what it raises becomes an exit code and `error: ...` lines: the error's own
    exit_code, or 2 for bad input, 4 for any other OSError, 130 for Ctrl-C, 0 for a closed pipe.
    """
    sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))  # `>&-`
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a name of any encoding can be shown
            stream.reconfigure(errors="backslashreplace")
    try:
        check_torchrun_variables()
        return main(argv) or 0
    except KeyboardInterrupt:
        if stderr.is_terminal:
            print(file=sys.stderr)  # so that the shell's prompt starts a new line after ^C
        return 130
    except BrokenPipeError:  # `generate.py | head`: the reader has what it wants
        stdout.on_broken_pipe()
        return 0
    except Exception as error:
        usual = 2 if isinstance(error, INPUT_ERRORS) else 4 if isinstance(error, OSError) else None
        code = getattr(error, "exit_code", usual)
        if code is None:
            raise
        if "--debug" in (sys.argv if argv is None else argv):
            traceback.print_exc()
        _show_error(error, code)
        return code


def _show_error(error, code):
    """Rank 0 reports errors that all processes share; each rank reports its `rank_local` ones."""
    label = "" if code > 128 else "error: "  # being interrupted is no error
    if world_size() > 1 and (code in (1, 4) or getattr(error, "rank_local", False)):
        label = f"process {rank()}: {label}"
    elif os.environ.get("LOCAL_RANK", "0") != "0":
        return
    text = str(error) or type(error).__name__
    if getattr(error, "filename", None):
        text = f"{error.filename}: {error.strerror}"
    for line in text.splitlines()[:100]:
        log(line[:1000], label, "red", every_rank=True)


# ---------------------------------------------------------------- the log of a run

TAGS = {"loss": "loss/train", "val_loss": "loss/val"}  # by record key; else the key itself
OWNER = ".checkpoint_dir"  # in a run's folder: whose run it is


class Record(TypedDict, extra_items=FiniteFloat | None):
    """A line of metrics.jsonl: these, and any other numbers."""

    step: Annotated[int, Field(ge=1, lt=2**40)]
    seconds: Annotated[FiniteFloat, Field(ge=0)]


@contextlib.contextmanager
def open_run(log_dir, checkpoint_dir, name: str | None, step: int, run_name: str | None = None):
    """Lock a run's folder; yield its name and its records up to step. name: the run to continue, if
    any; run_name: what its user calls it. A copied checkpoint_dir continues in a new folder.
    """
    here = os.path.realpath(checkpoint_dir)
    log_dir = files.own_folder(log_dir, link=True)
    dated = files.free_name(log_dir / time.strftime("%Y-%m-%d_%H-%M-%S"))
    before = log_dir / name if name else dated
    is_copy = (before / OWNER).is_file() and files.read_text(before / OWNER) != here
    folder = dated if is_copy else before
    if run_name not in (None, name):
        folder = log_dir / run_name
        if (folder / "metrics.jsonl").exists():
            raise ValueError(f"--run_name {run_name}: {folder} holds a run; choose another name")
    if name and folder != before:
        log_row("run", f"{folder} goes on from step {step:,} of {before}, which stays as it is")
    with files.lock(files.own_folder(folder)):
        files.write_file(folder / OWNER, here)
        path, records = before / "metrics.jsonl", []
        try:
            content = files.read_bytes(path, most=1 << 28) if path.exists() else b""
            for number, line in enumerate(content.split(b"\n")[:-1], 1):  # a kill cuts the last
                records.append(files.check_json(line, Record, f"{path}, line {number}"))
        except (OSError, ValueError) as error:
            if folder == before:
                aside = path.replace(files.free_name(f"{path}.damaged"))
                warn(f"{error}; the file is kept as {aside}")
        yield folder.name, [record for record in records if record["step"] <= step]


class RunLog:
    """A run's metrics.jsonl and TensorBoard's events, and a line on the terminal. Every rank has
    one; rank 0 writes. `records` are those of open_run, to which `write` adds.
    """

    def __init__(self, folder: Path, records: list[dict], step: int, total: int):
        self.folder, self.records, self.first_step, self.total = folder, records, step, total
        self.metrics = folder / "metrics.jsonl"
        self.events = folder / f"events.out.tfevents.{time.time():.6f}"
        steps = "step {task.completed}/{task.total}"
        self.bar = _live(steps, BarColumn(None), "{task.description}")
        self.task = self.bar.add_task("timing the first steps", total=total, completed=step)

    def start(self, config: dict):
        """On rank 0, write config.json (a valid --config) and earlier records; start the clock."""
        if rank() == 0:
            is_new, text = not any(self.folder.glob("events*")), json.dumps(config, indent=2)
            files.write_file(self.folder / "config.json", text)
            files.write_file(self.metrics, "".join(json.dumps(r) + "\n" for r in self.records))
            self._event(0, file_version="brain.Event:2")
            # what TensorBoard has of later steps is from a run that was killed
            self._event(self.first_step + 1, session_log={"status": "START"})
            self._plot({"step": self.first_step}, config=text)
            for record in self.records if is_new else ():
                self._plot(record)
        self.bar.start()
        self.started = time.perf_counter() - (self.records[-1]["seconds"] if self.records else 0)

    def _event(self, step, **content):
        """Written here because the thread of TensorBoard's own writer dies on a full disk."""
        from tensorboard.compat.proto.event_pb2 import Event  # slow to import
        from tensorboard.summary.writer.record_writer import RecordWriter

        event = Event(wall_time=time.time(), step=step, **content)
        with files.writing(self.events), files.open_to_append(self.events) as file:
            RecordWriter(file).write(event.SerializeToString())

    def _plot(self, record, **others):
        """Numbers become TensorBoard's curves, texts its texts."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        values = {TAGS.get(name, name): value for name, value in record.items()} | others
        if record.get("val_loss") is not None:
            values["perplexity/val"] = perplexity(record["val_loss"])
        summary = []
        for tag, value in values.items():
            if isinstance(value, str):
                summary += text_pb(tag, f"```\n{value}\n```").value
            elif value is not None and tag not in ("step", "seconds"):
                summary.append({"tag": tag, "simple_value": value})
        self._event(record["step"], summary={"value": summary})

    def advance(self, step: int):
        self.bar.update(self.task, completed=step)

    def write(self, record: dict, sample: str | None = None, memory_mb: float | None = None):
        """Log a step; `seconds` is summed over resumes, numbers that are not finite become None."""
        record["seconds"] = time.perf_counter() - self.started
        self._show(record)
        record |= {n: None for n, v in record.items() if v is not None and not math.isfinite(v)}
        self.records.append(record)
        if rank() == 0:
            with files.writing(self.metrics), files.open_to_append(self.metrics) as file:
                file.write(json.dumps(record).encode() + b"\n")
            self._plot(record, sample=sample, memory_mb=memory_mb)

    def val_losses(self) -> list[float]:
        """All validation losses; infinite where one was not finite."""
        losses = [record["val_loss"] for record in self.records if "val_loss" in record]
        return [math.inf if loss is None else loss for loss in losses]

    def _show(self, record):
        """Update the live line, or log a plain one; an evaluation's stays on a terminal, too."""
        step, loss = f"step {record['step']}/{self.total}: ", f"loss {record['loss']:.4f}"
        rate, speed = f"lr {record['lr']:.2e}", f"{record['tokens_per_second']:,.0f} tok/s"
        seconds = self.bar.tasks[0].time_remaining  # None until there are two updates
        left = [f"{human_time(seconds)} left"] if seconds else []
        self.bar.update(self.task, description=", ".join([*left, loss, rate, speed]))
        if self.bar.disable:
            mfu = [f"mfu {record['mfu']:.0%}"] if record["mfu"] else []
            norm = f"norm {record['grad_norm']:.2f}"
            log(step + ", ".join([loss, rate, norm, speed, *mfu, *left]))
        if "val_loss" in record:
            val_loss = record["val_loss"]
            parts = [f"val loss {val_loss:.4f}", f"perplexity {perplexity(val_loss):.2f}"]
            log(step + ", ".join(parts if self.bar.disable else [loss, *parts, *left]))

    def close(self):
        self.bar.stop()
