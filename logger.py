"""What a person reads: messages, progress, exit codes, and the log of a run.

Messages and progress go to stderr and come from rank 0 alone; results go to stdout.
"""

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

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from files import atomic_write, writing

LABEL = 11  # columns of the label before a text
LINE_SECONDS = 30  # between two lines of progress without a terminal
CONTROLS = {*range(32), *range(127, 160)} - {ord("\n"), ord("\t")}
ESCAPES = {code: f"\\x{code:02x}" for code in CONTROLS}


class _Console(Console):
    """rich's console; without colours and bold where NO_COLOR is set (https://no-color.org)."""

    def __init__(self, **kwargs):
        colors = None if os.environ.get("NO_COLOR") else "auto"
        super().__init__(color_system=colors, highlight=False, force_jupyter=False, **kwargs)

    @property
    def is_terminal(self):  # whatever FORCE_COLOR says: a file gets no escape codes
        return self.file.isatty()

    def on_broken_pipe(self):  # rich would end the program; its work continues, unheard
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


stdout, stderr = _Console(), _Console(stderr=True)


def rank() -> int:
    """Which of the processes that torchrun started this is; 0 if there is only one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


# ---------------------------------------------------------------- messages


def log(message: str = ""):
    """A message on stderr."""
    if rank() == 0:
        _print(message)


def log_row(label: str, text: str, style: str = "dim"):
    """`label      text`: the form of headers and summaries."""
    print_rows([(label, text, style)], console=stderr)


def warn(message: str):
    """A message about what may not be as it should."""
    if rank() == 0:
        _print(message, "warning: ", "yellow")


def log_next(*commands: str):
    """Say what to type next, a command a line."""
    print_rows([], *commands, console=stderr)


def print_rows(rows: list[tuple[str, str, str]], *next_commands: str, console=stdout):
    """Rows of (label, text, style) on stdout, for summaries that are results; then what to type
    next, never folded: it is there to be pasted.
    """
    if rank() > 0:
        return
    for label, text, style in rows:
        _print(text, f"{label:<{LABEL - 1}} ", style, console)
    if next_commands:
        _print("\n".join(next_commands), f"{'next':<{LABEL - 1}} ", "dim", console, fold=False)


def _print(text, label="", style="", console=stderr, fold=True):
    """label (styled) and text. A terminal gets it folded at words (a `command` stays whole), all
    lines of the text below each other; elsewhere a line stays as it is, for grep.
    """
    lines = visible(text).split("\n")
    if fold and console.is_terminal:
        width = max(20, console.width - 1 - len(label))
        wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
        whole = [re.sub("`.*?`", lambda part: part[0].replace(" ", "\0"), line) for line in lines]
        lines = [part.replace("\0", " ") for line in whole for part in wrapper.wrap(line) or [""]]
    text = f"\n{' ' * len(label)}".join(lines)
    console.print(Text.assemble((label, style), (text, "" if fold else "bold")), soft_wrap=True)


def visible(text: str) -> str:
    """text with what would steer a terminal spelt out: \\x1b."""
    return text.translate(ESCAPES)


def show(text: str, style: str = ""):
    """text on stdout at once; a terminal gets its control characters spelt out."""
    if style and stdout.is_terminal:
        stdout.print(Text(visible(text), style), end="", soft_wrap=True)
    else:
        print(visible(text) if stdout.is_terminal else text, end="", flush=True)


def command_for(script: str, *words) -> str:
    """The line that runs one of our scripts from the current folder with this very Python."""
    return quoted(program(), _from_here(Path(__file__).with_name(script)), *words)


def quoted(*words) -> str:
    """Words as a line for the shell of this system."""
    words = [str(word) for word in words]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def program(name: str | None = None) -> str:
    """What to type for this Python, or for a program that was installed next to it."""
    path = Path(sys.executable) if name is None else Path(sys.executable).with_name(name)
    if shutil.which(path.name) == str(path) or not path.exists():
        return path.name.removesuffix(".exe")
    return _from_here(path)


def _from_here(path):
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def human_time(seconds: float) -> str:
    """92 -> '1m32s'."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    if minutes == 0:
        return f"{seconds}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def perplexity(loss: float) -> float:
    """exp of a loss in nats; infinite if it overflows."""
    return math.exp(loss) if loss < 700 else math.inf


@contextlib.contextmanager
def progress(label: str, total: int | None, unit: str, done: int = 0):
    """Yield a function to be told how much more of a long piece of work is done. On a terminal that
    is a live line, gone when the work is; elsewhere a plain line every LINE_SECONDS.
    """
    count = "{task.completed:,.0f}" + (" / {task.total:,.0f}" if total else "") + f" {unit}"
    label = visible(label)
    name = TextColumn("{task.description}", markup=False)  # a file may be called [x]
    started = shown = time.monotonic()
    first = done
    with _live(name, BarColumn(None), TextColumn(count), TimeRemainingColumn()) as bar:
        task = bar.add_task(label, total=total, completed=done)

        def advance(amount):
            nonlocal done, shown
            done += amount
            now = time.monotonic()
            if now - shown < (LINE_SECONDS if bar.disable else 0.1):
                return
            shown = now
            bar.update(task, completed=done, refresh=True)
            if bar.disable and total:
                left = (now - started) / max(1, done - first) * (total - done)
                log(f"{label}: {done:,} of {total:,} {unit}, {human_time(left)} left")
            elif bar.disable:
                log(f"{label}: {done:,}")

        yield advance


def _live(*columns):
    """A live line on stderr, drawn when it is told to: no thread takes time from the work."""
    return Progress(
        *columns,
        console=stderr,
        transient=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=rank() > 0 or not stderr.is_terminal,
    )


# ---------------------------------------------------------------- exit codes


def run(main, argv=None) -> int:
    """Call a script's main and turn what it raises into an exit code and `error: ...` lines.

    2 bad input (ValueError, a file that cannot be read), 130 Ctrl-C, 0 a closed pipe, 4 any other
    OSError; the `exit_code` of our own exceptions' classes goes first. --debug adds the traceback.
    """
    arguments = sys.argv[1:] if argv is None else argv
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller (`>&-`)
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        if hasattr(getattr(sys, name), "reconfigure"):  # a name of any encoding can be shown
            getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        return main(argv) or 0
    except KeyboardInterrupt:
        if stderr.is_terminal:
            print(file=sys.stderr)  # so that the shell's prompt starts a new line after ^C
        return 130
    except BrokenPipeError:  # `generate.py | head`: the reader has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        if "--debug" in arguments:
            traceback.print_exc()
        _show_error(error, code)
        return code


def _exit_code(error):
    unreadable = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
    if hasattr(error, "exit_code"):
        return error.exit_code
    if isinstance(error, (ValueError, *unreadable)):
        return 2
    return 4 if isinstance(error, OSError) else None


def _show_error(error, code):
    """Rank 0 reports errors that all processes share; each rank reports its `rank_local` ones."""
    label = "" if code > 128 else "error: "  # being interrupted is no error
    if world_size() > 1 and (code in (1, 4) or getattr(error, "rank_local", False)):
        label = f"process {rank()}: {label}"
    elif os.environ.get("LOCAL_RANK", "0") != "0":
        return
    if isinstance(error, OSError) and error.strerror:
        lines = [f"{error.filename}: {error.strerror}" if error.filename else error.strerror]
    else:
        lines = str(error).splitlines() or [type(error).__name__]
    for line in lines:
        _print(line, label, "red")


# ---------------------------------------------------------------- the log of a run

# TensorBoard's Custom Scalars tab: for each chart the tags in it, which are regular expressions
CHARTS = {
    "training": {
        "loss, training and validation": ["Multiline", ["^loss/train$", "^loss/val$"]],
        "learning rate": ["Multiline", ["^lr$"]],
        "gradient norm, before clipping": ["Multiline", ["^grad_norm$"]],
    },
    "speed and memory": {
        "tokens per second": ["Multiline", ["^tokens_per_second$"]],
        "memory at most so far, MB (rank 0)": ["Multiline", ["^memory_mb$"]],
    },
}
TAGS = {"loss": "loss/train", "val_loss": "loss/val"}  # of records; the others are their own
# what TensorBoard's HParams tab leaves out: settings that change no weight
NOT_COMPARED = {
    *("checkpoint_dir", "checkpoint_interval", "keep_checkpoints", "log_dir", "log_interval"),
    *("eval_interval", "eval_iters", "peer_timeout", "preset"),
}


def open_run(log_dir, name: str | None, step: int) -> tuple[str, list[dict]]:
    """The name of a run's folder (None: a new, dated one) and what it has logged up to step: the
    steps after that will be repeated.
    """
    folder = Path(log_dir) / (name or time.strftime("%Y-%m-%d_%H-%M-%S"))
    with writing(folder):
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=name is not None)
                break
            except FileExistsError:  # of another run in the same second
                if name is not None:
                    raise
                folder = folder.with_name(f"{folder.name}_")
    records = []
    if (folder / "metrics.jsonl").exists():
        for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a kill may leave half a line
                records.append(json.loads(line))
    return folder.name, [record for record in records if record["step"] <= step]


class RunLog:
    """A run's metrics.jsonl and TensorBoard's events, and a line on the terminal. Every rank has
    one; rank 0 writes. `records` are those of open_run, to which `write` adds.
    """

    def __init__(self, folder: Path, records: list[dict], step: int, total: int):
        self.folder, self.records, self.total = folder, records, total
        self.first_step, self.writer = step, None
        self.seconds_before = records[-1]["seconds"] if records else 0.0
        self.bar = _live(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(None),
            TextColumn("{task.description}"),
        )
        self.task = self.bar.add_task("timing the first steps", total=total, completed=step)

    def start(self, config: dict, resolved: dict):
        """Open the files, on rank 0, and start the clock. config.json is a valid --config; by the
        resolved config, with what the machine and the schedule decided, TensorBoard compares runs.
        """
        if rank() == 0:
            with writing(self.folder):
                self._open(config, resolved)
        self.bar.start()
        self.started = self.drawn = time.perf_counter()

    def _open(self, config, resolved):
        from torch.utils.tensorboard import SummaryWriter  # slow to import
        from torch.utils.tensorboard.summary import hparams

        with atomic_write(self.folder / "config.json", "w") as file:
            json.dump(config, file, indent=2)
        with atomic_write(self.folder / "metrics.jsonl", "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in self.records)
        self.file = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")
        self.writer = SummaryWriter(str(self.folder), purge_step=self.first_step + 1)
        text = f"```\n{json.dumps(config, indent=2)}\n```"
        self.writer.add_text("config", text, self.first_step)
        self.writer.add_custom_scalars(CHARTS)
        # the row of the HParams tab; add_hparams would make a second run of it
        compared = {k: v for k, v in resolved.items() if k not in NOT_COMPARED}
        compared = {k: str(v) if isinstance(v, bool) else v for k, v in compared.items()}
        self.writer.file_writer.add_summary(hparams(compared, {})[1])

    def advance(self, step: int):
        """One more step is made: the live line counts it, ten times a second at most."""
        now = time.perf_counter()
        refresh = now - self.drawn > 0.1
        self.bar.update(self.task, completed=step, refresh=refresh)
        self.drawn = now if refresh else self.drawn

    def write(self, record: dict, sample: str | None = None, memory_mb: float | None = None):
        """Log one step; adds `seconds` since the first step, summed over resumes. A number that is
        not finite, as of a step that float16 has skipped, becomes None: JSON has no word for it.
        """
        elapsed = time.perf_counter() - self.started
        left = elapsed / (record["step"] - self.first_step) * (self.total - record["step"])
        self._show(record, left)
        record["seconds"] = self.seconds_before + elapsed
        record |= {name: None for name, v in record.items() if v and not math.isfinite(v)}
        self.records.append(record)
        if self.writer is None:
            return
        with writing(self.folder / "metrics.jsonl"):
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        step = record["step"]
        scalars = record | {"memory_mb": memory_mb}
        if record.get("val_loss") is not None:
            scalars |= {"perplexity/val": perplexity(record["val_loss"])}
            scalars |= {"best_val_loss": min(self.val_losses())}
        for name, value in scalars.items():
            if value is not None and name not in ("step", "seconds"):
                self.writer.add_scalar(TAGS.get(name, name), value, step)
        if sample is not None:
            self.writer.add_text("sample", f"```\n{sample}\n```", step)
            self.writer.flush()

    def val_losses(self) -> list[float]:
        """Those of all evaluations so far; infinite if one was not finite."""
        losses = [record["val_loss"] for record in self.records if "val_loss" in record]
        return [math.inf if loss is None else loss for loss in losses]

    def _show(self, record, left):
        """The live line, or a plain one; an evaluation's stays on a terminal too."""
        step, loss = f"step {record['step']}/{self.total}: ", f"loss {record['loss']:.4f}"
        rate, speed = f"lr {record['lr']:.2e}", f"{record['tokens_per_second']:,.0f} tok/s"
        mfu = [] if record["mfu"] is None else [f"mfu {record['mfu']:.0%}"]
        left = [] if record["step"] == self.total else [f"{human_time(left)} left"]
        if self.bar.disable:
            norm = f"norm {record['grad_norm']:.2f}"
            log(step + ", ".join([loss, rate, norm, speed, *mfu, *left]))
        self.bar.update(self.task, description=", ".join([*left, loss, rate, speed]))
        if "val_loss" in record:
            val_loss = record["val_loss"]
            parts = [f"val loss {val_loss:.4f}", f"perplexity {perplexity(val_loss):.2f}"]
            log(step + ", ".join(parts if self.bar.disable else [loss, *parts, *left]))

    def close(self):
        """Remove the live line and close the files."""
        self.bar.stop()
        if self.writer is not None:
            self.writer.close()
            self.file.close()
