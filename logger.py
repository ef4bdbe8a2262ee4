"""What a person reads: results on stdout; messages and progress, of rank 0 alone, on stderr; exit
codes; and the log of a run.
"""

import contextlib
import io
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
from rich.console import Console, ConsoleDimensions
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
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
    def size(self):  # leaves room for the ^C that a terminal puts after a live line
        columns, rows = super().size
        return ConsoleDimensions(columns - 2, rows)

    def on_broken_pipe(self):  # rich would exit; the work goes on without output
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


# no colours, nor bold, where NO_COLOR is set (https://no-color.org)
STYLE = {"color_system": None if os.environ.get("NO_COLOR") else "auto", "highlight": False}
stdout, stderr = (_Console(stderr=there, force_jupyter=False, **STYLE) for there in (False, True))


def rank() -> int:
    """Which of the processes that torchrun started this is; 0 if there is only one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_place():
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
    lines = visible(text).split("\n")
    if fold and console.is_terminal:
        width = max(20, console.width - len(label))
        wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
        whole = [re.sub("`.*?`", lambda part: part[0].replace(" ", "\0"), line) for line in lines]
        lines = [part.replace("\0", " ") for line in whole for part in wrapper.wrap(line) or [""]]
    text = f"\n{' ' * len(label)}".join(lines)
    console.print(Text.assemble((label, style), (text, "" if fold else "bold")), soft_wrap=True)


def log_row(label: str, text: str, style: str = "dim", console=stderr):
    """`label      text`: the form of headers and summaries; on stdout if they are results."""
    log(text, f"{label:<10} ", style, console)


def log_next(*commands: str, console=stderr):
    """Log the next commands to type, one per line and never wrapped, ready to paste."""
    log("\n".join(commands), f"{'next':<10} ", "dim", console, fold=False)


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
    return quoted(from_here(sys.executable), from_here(Path(__file__).with_name(script)), *words)


def quoted(*words) -> str:
    """Words as a command line, quoted for this system's shell."""
    words = [str(word) for word in words]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def from_here(path):
    """path as typed: relative to the current folder, or its name alone if that is on PATH."""
    path, here = Path(path), Path.cwd()
    if shutil.which(path.name) == str(path) or not path.exists():
        return path.name.removesuffix(".exe")
    return path.relative_to(here) if path.is_relative_to(here) else path


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
    label, shown = visible(label), time.monotonic()
    name = TextColumn("{task.description}", markup=False)  # a file may be called [x]
    count = "{task.completed:,.0f}" + (" / {task.total:,.0f}" if total else "") + f" {unit}"
    with _live(name, BarColumn(None), count, TimeRemainingColumn()) as bar:
        bar.add_task(label, total=total, completed=done)
        (task,) = bar.tasks

        def advance(amount):
            nonlocal shown
            bar.advance(task.id, amount)
            if bar.disable and time.monotonic() - shown >= LINE_SECONDS:
                shown, of = time.monotonic(), ""
                if total:
                    left = task.elapsed / max(1, task.completed - done) * task.remaining
                    of = f" of {total:,} {unit}, {human_time(left)} left"
                log(f"{label}: {task.completed:,}{of}")

        yield advance


def _live(*columns):
    """A live line on stderr."""
    hidden = rank() > 0 or not stderr.is_terminal
    alone = {"transient": True, "redirect_stdout": False, "redirect_stderr": False}
    return Progress(*columns, console=stderr, disable=hidden, **alone)


# ---------------------------------------------------------------- exit codes


def run(main, argv=None) -> int:
    """Call a script's main and turn what it raises into an exit code and `error: ...` lines:
    2 bad input (ValueError, a file that cannot be read), 130 Ctrl-C, 0 a closed pipe, 4 any other
    OSError; the `exit_code` of our own exceptions' classes goes first. --debug adds the traceback.
    """
    sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))  # `>&-`
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a name of any encoding can be shown
            stream.reconfigure(errors="backslashreplace")
    try:
        check_place()
        return main(argv) or 0
    except KeyboardInterrupt:
        if stderr.is_terminal:
            print(file=sys.stderr)  # so that the shell's prompt starts a new line after ^C
        return 130
    except BrokenPipeError:  # `generate.py | head`: the reader has what it wants
        stdout.on_broken_pipe()
        return 0
    except Exception as error:
        other = 4 if isinstance(error, OSError) else None
        code = getattr(error, "exit_code", 2 if isinstance(error, INPUT_ERRORS) else other)
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
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    for line in text.splitlines():
        log(line[:1000], label, "red", every_rank=True)  # a file's content may be in it


# ---------------------------------------------------------------- the log of a run

TAGS = {"loss": "loss/train", "val_loss": "loss/val"}  # of records; the others are their own
OWNER = ".checkpoint_dir"  # in a run's folder: whose run it is


class Record(TypedDict, extra_items=FiniteFloat | None):
    """A line of metrics.jsonl: these, and any other numbers."""

    step: Annotated[int, Field(ge=1, lt=2**40)]
    seconds: Annotated[FiniteFloat, Field(ge=0)]


@contextlib.contextmanager
def open_run(log_dir, checkpoint_dir, name: str | None, step: int, run_name: str | None = None):
    """Lock a run's folder; yield its name and the records up to step. name: the run to continue,
    None for a new one; run_name: what its user calls it. A folder belongs to one checkpoint_dir:
    a copied checkpoint_dir continues in a new folder.
    """
    files.own_folder(log_dir, link=True)
    dated = Path(log_dir, time.strftime("%Y-%m-%d_%H-%M-%S"))
    before = folder = Path(log_dir, name) if name else files.free_name(dated)
    owner = here = os.path.realpath(checkpoint_dir)
    with contextlib.suppress(OSError, ValueError):
        owner = files.read_text(before / OWNER)
    if run_name not in (None, name):
        folder = Path(log_dir, run_name)
        if (folder / "metrics.jsonl").exists():
            raise ValueError(f"--run_name {run_name}: {folder} holds a run; choose another name")
    elif owner != here:
        folder = files.free_name(dated)
    if name and folder != before:
        log_row("run", f"{folder} goes on from step {step:,} of {before}, which stays as it is")
    with files.lock(files.own_folder(folder)):
        with files.atomic_write(folder / OWNER, "w") as file:
            file.write(here)
        path, records = before / "metrics.jsonl", []
        try:
            content = files.read_bytes(path, most=1 << 28) if path.exists() else b""
            for number, line in enumerate(io.BytesIO(content), start=1):
                if line.endswith(b"\n"):  # half a line at the end is what a kill may leave
                    records.append(files.check_json(line, Record, f"{path}, line {number}"))
        except (OSError, ValueError) as error:
            if folder == before:
                aside = files.free_name(f"{path}.damaged")
                os.replace(path, aside)
                warn(f"{error}; the file is kept as {aside}")
        yield folder.name, [record for record in records if record["step"] <= step]


class RunLog:
    """A run's metrics.jsonl and TensorBoard's events, and a line on the terminal. Every rank has
    one; rank 0 writes. `records` are those of open_run, to which `write` adds.
    """

    def __init__(self, folder: Path, records: list[dict], step: int, total: int):
        self.folder, self.records, self.total = folder, records, total
        self.first_step, self.files = step, []
        self.seconds_before = records[-1]["seconds"] if records else 0.0
        steps = "step {task.completed:.0f}/{task.total:.0f}"
        self.bar = _live(steps, BarColumn(None), "{task.description}")
        self.task = self.bar.add_task("timing the first steps", total=total, completed=step)

    def start(self, config: dict):
        """Open the files, on rank 0, and start the clock. config.json is a valid --config."""
        if rank() == 0:
            with files.writing(self.folder):
                is_copy, text = not any(self.folder.glob("events*")), json.dumps(config, indent=2)
                lines = "".join(json.dumps(record) + "\n" for record in self.records)
                for name, content in ("config.json", text), ("metrics.jsonl", lines):
                    with files.atomic_write(self.folder / name, "w") as file:
                        file.write(content)
                names = "metrics.jsonl", f"events.out.tfevents.{time.time():.6f}"
                self.files = [files.open_to_append(self.folder / name) for name in names]
                self._event(0, file_version="brain.Event:2")
                # what TensorBoard has of later steps is from a run that was killed
                self._event(self.first_step + 1, session_log={"status": "START"})
                self._plot({"step": self.first_step}, config=text)
                for record in self.records if is_copy else ():
                    self._plot(record)
        self.bar.start()
        self.started = time.perf_counter()

    def _event(self, step, **content):
        """Written here because the thread of TensorBoard's own writer dies on a full disk."""
        from tensorboard.compat.proto.event_pb2 import Event  # slow to import
        from tensorboard.summary.writer.record_writer import RecordWriter

        event = Event(wall_time=time.time(), step=step, **content)
        RecordWriter(self.files[1]).write(event.SerializeToString())

    def _plot(self, record, **others):
        """Numbers become TensorBoard's curves, texts its texts."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        values = {TAGS.get(name, name): value for name, value in record.items()} | others
        if record.get("val_loss") is not None:
            values["perplexity/val"] = perplexity(record["val_loss"])
            values["best_val_loss"] = min(self.val_losses(record["step"]))
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
        elapsed = time.perf_counter() - self.started
        self._show(record, elapsed / (record["step"] - self.first_step))
        record["seconds"] = self.seconds_before + elapsed
        record |= {name: None for name, v in record.items() if v and not math.isfinite(v)}
        self.records.append(record)
        if self.files:
            with files.writing(self.folder):
                self.files[0].write(json.dumps(record).encode() + b"\n")
                self._plot(record, sample=sample, memory_mb=memory_mb)
                for file in self.files:
                    file.flush()

    def val_losses(self, step=math.inf) -> list[float]:
        """Validation losses up to step; infinite where one was not finite."""
        records = [r for r in self.records if "val_loss" in r and r["step"] <= step]
        return [math.inf if r["val_loss"] is None else r["val_loss"] for r in records]

    def _show(self, record, step_seconds):
        """Update the live line, or log a plain one; an evaluation's stays on a terminal, too."""
        step, loss = f"step {record['step']}/{self.total}: ", f"loss {record['loss']:.4f}"
        rate, speed = f"lr {record['lr']:.2e}", f"{record['tokens_per_second']:,.0f} tok/s"
        steps = self.total - record["step"]
        left = [f"{human_time(steps * step_seconds)} left"] if steps else []
        self.bar.update(self.task, description=", ".join([*left, loss, rate, speed]))
        if self.bar.disable:
            norm = f"norm {record['grad_norm']:.2f}"
            mfu = [] if record["mfu"] is None else [f"mfu {record['mfu']:.0%}"]
            log(step + ", ".join([loss, rate, norm, speed, *mfu, *left]))
        if "val_loss" in record:
            val_loss = record["val_loss"]
            parts = [f"val loss {val_loss:.4f}", f"perplexity {perplexity(val_loss):.2f}"]
            log(step + ", ".join(parts if self.bar.disable else [loss, *parts, *left]))

    def close(self):
        self.bar.stop()
        for file in self.files:
            with contextlib.suppress(OSError):  # no room for what a failed write left in the buffer
                file.close()
