"""The machine and the terminal: messages, exit codes, curves, locks, seeds, device, precision."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import difflib
import hashlib
import http.client
import importlib
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
import urllib.error
import urllib.request
from pathlib import Path

import filelock
from tqdm import tqdm


class _Later:
    """A module that is imported when it is first used."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        return getattr(importlib.import_module(self._name), attribute)


torch = _Later("torch")  # takes half a second, which preparing text and --help do not need

# ---------------------------------------------------------------- messages and exit codes


STYLES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33}
LABEL = 11  # columns of the label before a text
LINE_SECONDS = 30  # between two lines of progress where there is no terminal


def styled(text: str, style: str, stream=None) -> str:
    """text in a style of STYLES where stream (stderr if not given) is a terminal that shows styles
    and NO_COLOR (https://no-color.org) is not set; as it is elsewhere.
    """
    unwanted = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if not text or unwanted or not (stream or sys.stderr).isatty():
        return text
    return f"\033[{STYLES[style]}m{text}\033[0m"


def laid_out(text: str, label: str = "", style: str = "dim", stream=None) -> str:
    """label (styled) and text. A terminal gets it folded at words (a `command` stays whole), all
    lines of the text below each other; elsewhere a line stays as it is, for grep.
    """
    lines = text.split("\n")
    if (stream or sys.stderr).isatty():
        width = max(20, shutil.get_terminal_size().columns - 1 - len(label))
        fold = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
        whole = [re.sub("`.*?`", lambda part: part[0].replace(" ", "\0"), line) for line in lines]
        lines = [part.replace("\0", " ") for line in whole for part in fold.wrap(line) or [""]]
    return styled(label, style, stream) + f"\n{' ' * len(label)}".join(lines)


def labelled(label: str, text: str, style: str = "dim", stream=None) -> str:
    """`label      text`, the form of headers and summaries."""
    return laid_out(text, f"{label:<{LABEL - 1}} ", style, stream)


def next_commands(*commands: str, stream=None) -> str:
    """The row of what to type next, a command a line, never folded: they are there to be pasted."""
    lines = [styled(command, "bold", stream) for command in commands]
    return labelled("next", "", stream=stream) + f"\n{' ' * LABEL}".join(lines)


def log(message: str = ""):
    """A message on stderr, from the first process only; stdout is for results."""
    _log(laid_out(message))


def log_row(label: str, text: str, style: str = "dim"):
    """log, with a label before the message."""
    _log(labelled(label, text, style))


def log_next(*commands: str):
    """Say what to type next."""
    _log(next_commands(*commands))


def warn(message: str):
    """log of what may not be as it should."""
    _log(laid_out(message, "warning: ", "yellow"))


def _log(text):
    if rank() == 0:
        _print(text)


def _print(text):
    """text on stderr, in one piece; where its reader has gone (`| head`), the work goes on."""
    try:
        with tqdm.external_write_mode(file=sys.stderr):  # a live line makes room and comes back
            print(f"{text}\n", end="", file=sys.stderr, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def command_for(script: str, *words) -> str:
    """The line that runs one of our scripts from the current folder with this very Python."""
    return quoted(program(), from_here(Path(__file__).with_name(script)), *words)


def quoted(*words) -> str:
    """Words as a line for the shell of this system."""
    words = [str(word) for word in words]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def program(name: str | None = None) -> str:
    """What to type for this Python, or for a program that was installed beside it."""
    path = Path(sys.executable) if name is None else Path(sys.executable).with_name(name)
    if shutil.which(path.name) == str(path) or not path.exists():
        return path.name.removesuffix(".exe")
    return from_here(path)


def from_here(path: Path) -> str:
    """path, relative where it is below the current folder."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


@contextlib.contextmanager
def live_line(label: str, total: int | None, unit: str, done: int = 0):
    """Yield a function to be told how much more of a long piece of work is done. On a terminal that
    is a live line, gone when the work is; elsewhere a plain line every LINE_SECONDS.
    """
    bar = tqdm(
        desc=label,
        total=total,
        initial=done,
        unit=unit,
        unit_scale=total is None or total > 9999,
        dynamic_ncols=True,
        leave=False,
        disable=rank() > 0 or not sys.stderr.isatty(),
    )
    first, started = done, time.monotonic()
    said = started

    def advance(amount):
        nonlocal done, said
        done += amount
        bar.update(amount)
        now = time.monotonic()
        if bar.disable and now - said >= LINE_SECONDS:
            said, far = now, f"{label}: {done:,}"
            if total:
                left = (now - started) / max(1, done - first) * (total - done)
                far = f"{far} of {total:,} {unit}, {human_time(left)} left"
            log(far)

    with bar:
        yield advance


IN_NANOGPT = {  # its names for what ours calls otherwise
    "--out_dir": "--checkpoint_dir",
    "--dataset": "--data_dir",
    "--start": "--prompt",
    "--decay_lr": "--lr_schedule",
    "--always_save_checkpoint": "--checkpoint_interval",
    "--wandb_log": "--log_dir",
    "--wandb_project": "--log_dir",
    "--wandb_run_name": "--log_dir",
    "--backend": "--device",
}


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose complaints are ValueErrors, so that every script reports them alike.

    doc: a script's docstring. --help begins with its first line and ends with its commands, those
    that are indented before the next paragraph.
    """

    def __init__(self, doc: str | None = None, **kwargs):
        if doc is not None:
            purpose, commands, *_ = doc.split("\n\n")
            kwargs["description"] = textwrap.fill(purpose.strip(), 78)
            kwargs["epilog"] = f"examples:\n{textwrap.indent(textwrap.dedent(commands), '  ')}"
        formatter = argparse.RawDescriptionHelpFormatter  # the examples stand as they are
        super().__init__(allow_abbrev=False, formatter_class=formatter, **kwargs)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message):
        raise ValueError(f"{message} (see {self.prog} --help)")

    def parse_args(self, args=None, namespace=None):
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            raise ValueError("\n".join(self.unknown_flags(unknown)))
        return known

    def unknown_flags(self, unknown) -> list[str]:
        """One line for each unknown flag, with the one that is meant, or the nearest in writing."""
        flags = [option for action in self._actions for option in action.option_strings]
        problems = []
        for word in (word.split("=")[0] for word in unknown if word.startswith("--")):
            meant = [IN_NANOGPT[word]] if IN_NANOGPT.get(word) in flags else []
            near = meant or difflib.get_close_matches(word, flags, n=1)
            hint = f"; did you mean {near[0]}?" if near else f" (see {self.prog} --help)"
            problems.append(f"unknown flag {word}{hint}")
        as_json = unknown[0].endswith(".py") and "--config" in flags  # as in nanoGPT
        hint = "; settings are flags, or JSON for --config" if as_json else ""
        return problems or [f"unexpected argument {unknown[0]!r}{hint} (see {self.prog} --help)"]


def run(main, argv=None) -> int:
    """Call a script's main and turn what it raises into an exit code and `error: ...` lines.

    2 bad input (ValueError, a file that cannot be read), 4 could not write (any other OSError),
    130 Ctrl-C, 0 a closed pipe; an exception's own `exit_code` goes first. --debug adds the
    traceback. Of several processes each says what is its `own`, one a machine what all have met.
    """
    arguments = sys.argv[1:] if argv is None else argv
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this (`>&-`)
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    try:
        return main(argv) or 0
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # the shell's prompt shall not follow a ^C
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
        prefix = "" if code > 128 else "error: "  # being interrupted is no error
        if world_size() > 1 and (code in (1, 4) or getattr(error, "own", False)):
            prefix = f"process {rank()}: {prefix}"  # others may fare otherwise
        elif os.environ.get("LOCAL_RANK", "0") != "0":
            return code
        for line in _one_line_each(error):
            _print(laid_out(line, prefix, "red"))
        return code


def _exit_code(error):
    if hasattr(error, "exit_code"):
        return error.exit_code
    unreadable = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
    if isinstance(error, (ValueError, *unreadable)):
        return 2
    return 4 if isinstance(error, OSError) else None


@contextlib.contextmanager
def writing():
    """Whatever the system refuses in here is a 4, a folder that is read-only too."""
    try:
        yield
    except OSError as error:
        error.exit_code = 4
        raise


def _one_line_each(error):
    if isinstance(error, OSError) and error.strerror:
        return [f"{error.filename}: {error.strerror}" if error.filename else error.strerror]
    return str(error).splitlines() or [type(error).__name__]


# ---------------------------------------------------------------- curves and progress

# TensorBoard's Custom Scalars tab: for each chart the tags in it, which are regular expressions
CHARTS = {
    "training": {
        "loss, training and validation": ["Multiline", ["^loss/train$", "^loss/val$"]],
        "learning rate": ["Multiline", ["^lr$"]],
        "gradient norm, before clipping": ["Multiline", ["^grad_norm$"]],
    },
    "speed and memory": {
        "tokens per second": ["Multiline", ["^tokens_per_second$"]],
        "memory at most so far, MB (first process)": ["Multiline", ["^memory_mb$"]],
    },
}
# what its HParams tab leaves out: settings that change no weight
NOT_COMPARED = (
    *("checkpoint_dir", "checkpoint_interval", "keep_checkpoints", "log_dir", "log_interval"),
    *("eval_interval", "eval_iters", "peer_timeout", "preset"),
)


class RunLog:
    """A run's folder: metrics.jsonl, config.json and TensorBoard's events; and the terminal's line.

    A run that goes on from an earlier step drops what was logged after it, for those steps will be
    made again. All processes know the records, the first one writes.
    """

    def __init__(self, log_dir, name, config: dict, step: int):
        self.name = from_first(lambda: name or _new_name(Path(log_dir)))
        self.folder = Path(log_dir) / self.name
        self.config, self.path = config, self.folder / "metrics.jsonl"
        records = from_first(lambda: _read_records(self.path))
        self.records = [record for record in records if record["step"] <= step]
        self.bar = self.writer = None

    def start(self, step: int, total: int, tokens_per_step: int, compared: dict):
        """The first step is about to be made: open the folder's files.

        compared: the config by which TensorBoard compares runs, with the device and what it set.
        """
        self.first_step, self.total, self.tokens_per_step = step, total, tokens_per_step
        self.seconds_before = self.records[-1]["seconds"] if self.records else 0.0
        if rank() == 0:
            self._open(step)
            self._lay_out(compared)
            if sys.stderr.isatty():
                self.bar = tqdm(
                    desc="timing the first steps",
                    total=total,
                    initial=step,
                    bar_format="step {n_fmt}/{total_fmt} |{bar}| {desc}",
                    dynamic_ncols=True,
                    leave=False,
                )
        self.started = self.since = time.perf_counter()
        self.since_step = step

    @writing()
    def _open(self, step):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(self.config, indent=2), "utf-8")
        aside = self.folder / ".metrics.jsonl.tmp"
        aside.write_text("".join(json.dumps(record) + "\n" for record in self.records), "utf-8")
        os.replace(aside, self.path)
        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1)
        self.writer.add_text("config", f"```\n{json.dumps(self.config, indent=2)}\n```", step)
        self.file = open(self.path, "a", encoding="utf-8")

    def _lay_out(self, compared):
        """TensorBoard's charts, and this run's row in its HParams tab.

        The row goes into the run's own events; add_hparams would make a second run of it. A resumed
        run writes both again: TensorBoard shows one, the row as it was first.
        """
        from torch.utils.tensorboard.summary import hparams

        self.device = torch.device(compared["device"])
        self.writer.add_custom_scalars(CHARTS)
        columns = {
            name: str(value) if isinstance(value, bool) else value  # hparams would make True a 1
            for name, value in compared.items()
            if name not in NOT_COMPARED
        }
        _, row, _ = hparams(columns, {})
        self.writer.file_writer.add_summary(row)

    def tokens_per_second(self, step: int) -> float:
        """Over the steps since the last line; evaluating, logging and saving are left out."""
        speed = (step - self.since_step) * self.tokens_per_step / (time.perf_counter() - self.since)
        self.since_step = step
        return speed

    @contextlib.contextmanager
    def paused(self):
        """What is done here does not count for tokens_per_second."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def write(self, record: dict, sample: str | None = None):
        """Log one step; adds `seconds` since the first step, summed over resumes. A number that is
        not finite, as of a step that float16 has skipped, becomes None: JSON has no word for it.
        """
        elapsed = time.perf_counter() - self.started
        left = elapsed / (record["step"] - self.first_step) * (self.total - record["step"])
        self._show(record, left)
        record["seconds"] = self.seconds_before + elapsed
        record |= {name: None for name, v in record.items() if v and not math.isfinite(v)}
        self.records.append(record)
        if self.writer is not None:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
            self._write_events(record, sample)
        self.since = time.perf_counter()

    def val_losses(self) -> list[float]:
        """Of all evaluations so far; infinite where one was not finite."""
        losses = [record["val_loss"] for record in self.records if "val_loss" in record]
        return [math.inf if loss is None else loss for loss in losses]

    def _write_events(self, record, sample):
        step = record["step"]
        tags = {"loss": "loss/train", "val_loss": "loss/val"}
        for name in ("loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "mfu"):
            if record.get(name) is not None:
                self.writer.add_scalar(tags.get(name, name), record[name], step)
        if (memory := peak_mb(self.device)) is not None:
            self.writer.add_scalar("memory_mb", memory, step)
        if record.get("val_loss") is not None:
            self.writer.add_scalar("perplexity/val", perplexity(record["val_loss"]), step)
            self.writer.add_scalar("best_val_loss", min(self.val_losses()), step)
        if sample is not None:
            self.writer.add_text("sample", f"```\n{sample}\n```", step)
            self.writer.flush()

    def advance(self, step):
        """One more step is made: the live line counts it."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def _show(self, record, left):
        """The live line, or a plain one; an evaluation's stays on a terminal too."""
        step, loss = f"step {record['step']}/{self.total}: ", f"loss {record['loss']:.4f}"
        rate, speed = f"lr {record['lr']:.2e}", f"{record['tokens_per_second']:,.0f} tok/s"
        mfu = [] if record["mfu"] is None else [f"mfu {record['mfu']:.0%}"]
        left = [] if record["step"] == self.total else [f"{human_time(left)} left"]
        if self.bar is None:
            norm = f"norm {record['grad_norm']:.2f}"
            log(step + ", ".join([loss, rate, norm, speed, *mfu, *left]))
        else:
            self.bar.set_description_str(", ".join([*left, loss, rate, speed]))  # 79 columns
        if "val_loss" in record:
            val_loss = record["val_loss"]
            parts = [f"val loss {val_loss:.4f}", f"perplexity {perplexity(val_loss):.2f}"]
            log(step + ", ".join(parts if self.bar is None else [loss, *parts, *left]))

    def close(self):
        if self.bar is not None:
            self.bar.close()
        if self.writer is not None:
            self.writer.close()
            self.file.close()


def perplexity(loss: float) -> float:
    """exp of a loss in nats; infinite where it overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def _new_name(log_dir):
    """The name of a new, dated folder in log_dir, which no other run can have taken too."""
    name = time.strftime("%Y-%m-%d_%H-%M-%S")
    with writing():
        log_dir.mkdir(parents=True, exist_ok=True)
        while True:
            with contextlib.suppress(FileExistsError):
                (log_dir / name).mkdir()
                return name
            name += "_"


def _read_records(path):
    records = []
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a kill may leave half a line
                records.append(json.loads(line))
    return records


# ---------------------------------------------------------------- downloads

TIMEOUT, TRIES, PAUSE = 10, 3, 0.5  # of a download: seconds, number, seconds between two


def download(address: str, sha256: str, path: Path):
    """Put what is at address at path, whole or not at all; ValueError saying why not, after a few
    tries. For files that fit in memory.
    """
    for attempt in range(TRIES):
        try:
            content = _fetch(address, sha256)
            break
        except (OSError, http.client.HTTPException, ValueError) as error:
            is_status = isinstance(error, urllib.error.HTTPError)
            problem = error if is_status else getattr(error, "reason", error)
        if attempt == TRIES - 1:
            raise ValueError(problem)
        time.sleep(PAUSE)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _fetch(address, sha256):
    parts = []
    with urllib.request.urlopen(address, timeout=TIMEOUT) as response:
        size = int(response.headers.get("Content-Length") or 0)
        with live_line("downloading", size or None, "B") as advance:
            while block := response.read(1 << 16):
                parts.append(block)
                advance(len(block))
    content = b"".join(parts)
    if len(content) < size:
        raise ValueError(f"cut short, {len(content):,} of {size:,} bytes came")
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"another file came, {len(content):,} bytes with a wrong sha256")
    return content


# ---------------------------------------------------------------- locks


@contextlib.contextmanager
def lock(folder):
    """Hold folder for this process; ValueError naming the holder while another one has it.

    The operating system frees the lock when its holder dies, however it dies.
    """
    folder = Path(folder)
    try:
        with writing():
            folder.mkdir(parents=True, exist_ok=True)
            held, note = filelock.FileLock(folder / ".lock"), folder / ".lock_holder"
            held.acquire(timeout=0)
    except filelock.Timeout:
        holder = ""
        with contextlib.suppress(OSError):  # it may have taken the lock just now
            holder = note.read_text("utf-8").strip()
        raise ValueError(
            f"{folder} is in use by {holder or 'another process'}; "
            "wait for it to end, or choose another folder"
        ) from None
    try:
        who = f"process {os.getpid()} ({' '.join(map(_short, sys.argv))})"
        note.write_text(who, "utf-8", "backslashreplace")  # a name may be in any encoding
        yield
    finally:
        with contextlib.suppress(OSError):
            note.unlink()
        held.release()


def _short(word):
    return word if len(word) <= 60 else word[:57] + "..."


# ---------------------------------------------------------------- processes and seeds


def rank() -> int:
    """Which of the processes started by torchrun this is; 0 alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


class PeerError(Exception):
    """Another process died or stopped answering."""

    exit_code = 1


@contextlib.contextmanager
def process_group(device: torch.device, timeout: float = 600):
    """Join the other processes that torchrun started, if any; PeerError naming those that do not
    answer, when one has waited timeout seconds for them or has lost the connection.

    Tensors on a GPU travel through NCCL, those in host memory through gloo. Yields a gloo group for
    agreeing on the host: it gives up earlier than NCCL, which ends the process without a word.
    """
    if world_size() == 1 or torch.distributed.is_initialized():
        yield None
        return
    dist, cuda = torch.distributed, device.type == "cuda"
    patience = datetime.timedelta(seconds=timeout)
    store = None
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=patience))
        store = _store_of_this_start(store, timeout)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=rank(),
            world_size=world_size(),
            timeout=2 * patience if cuda else patience,
            device_id=device if cuda else None,
        )
        yield dist.new_group(backend="gloo", timeout=patience)
    except RuntimeError as error:  # gloo has no class of its own
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise PeerError(_who_is_lost(store, error)) from error
    dist.destroy_process_group()  # not after an error: it might wait for the dead


def _store_of_this_start(store, timeout):
    """A part of torchrun's store that only these processes use.

    When torchrun starts all anew, the store still has the addresses of the dead, and whoever comes
    early would call them. So each process counts its starts, the first one puts the counts
    together, and when all have agreed to them they name the part.
    """
    starts, agreed = store.add(f"starts {rank()}", 1), None
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        if rank() == 0:
            counts = [str(store.add(f"starts {other}", 0)) for other in range(world_size())]
            store.set("counts", ",".join(counts))
        counts = store.get("counts").decode()
        if counts != agreed and counts.split(",")[rank()] == str(starts):
            store.add(f"agreed {counts}", 1)
            agreed = counts
        if agreed and store.add(f"agreed {agreed}", 0) == world_size():
            return torch.distributed.PrefixStore(agreed, store)
        time.sleep(0.01)
    raise torch.distributed.DistStoreError(f"not all processes came within {timeout:g} seconds")


def _who_is_lost(store, error, seconds: float = 3) -> str:
    """Every process that comes here says so in the store: the others are lost."""
    reason = re.sub(r"\[/\S+\] ", "", str(error).strip().splitlines()[0])  # less file names
    reason = reason.split(". ")[0]
    if store is None:
        return f"the first process cannot be reached ({reason})"
    try:
        store.set(f"waiting {rank()}", "")
        until = time.monotonic() + seconds
        lost = range(world_size())
        while lost and time.monotonic() < until:
            lost = [other for other in lost if not store.check([f"waiting {other}"])]
            time.sleep(0.05)
    except RuntimeError:
        return f"the connection to the first process is lost ({reason})"
    names = " and ".join(f"process {other}" for other in lost) or "a process"
    return f"{names} of {world_size()} died or does not answer ({reason})"


def sum_over_processes(tensor):
    """tensor, now the sum of those of all processes."""
    if world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def gather_from_processes(items: list) -> list:
    """The items of all processes, in the order of their ranks; the same list everywhere."""
    if world_size() == 1:
        return items
    lists = [None] * world_size()
    torch.distributed.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def from_first(function):
    """What function returns, or raises, in the first process; the others do not call it."""
    if world_size() == 1:
        return function()
    answer = [None, None]
    if rank() == 0:
        try:
            answer[0] = function()
        except Exception as error:  # whatever it is, it is everybody's
            answer[1] = error
    torch.distributed.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def outline_from_first(function):
    """from_first for plain data with tensors in it. These are in the first process alone; in the
    others they are on "meta", without numbers, until tensor_from_first gets them one by one.
    """
    found = []

    def outline():
        found.append(function())
        return found[0] if world_size() == 1 else _on_meta(found[0])

    outline = from_first(outline)
    return found[0] if found else outline


def tensor_from_first(tensor):
    """A tensor of an outline with its numbers, in host memory; every process must ask for it."""
    if world_size() > 1:
        tensor = torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor
        torch.distributed.broadcast(tensor, 0)
    return tensor


def _on_meta(value):
    """A nest of dicts with its tensors on "meta"."""
    if isinstance(value, dict):
        return {key: _on_meta(part) for key, part in value.items()}
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def derived_seed(*numbers: int) -> int:
    """A 63-bit seed from a few integers (splitmix64, Steele 2014), the same everywhere."""
    state = 0
    for number in numbers:
        state = (state + (number & (2**64 - 1)) + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


# ---------------------------------------------------------------- device and precision

# dense bf16/fp16 tensor-core peaks in FLOP/s, from the makers' data sheets
PEAK_FLOPS = {
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def pick_device(name: str | None = None) -> tuple[torch.device, str]:
    """The device to use and why; ValueError where the one asked for is not there.

    On CUDA each process of a machine has a device of its own.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    there = {"cuda": cuda, "mps": mps, "cpu": True}
    why = "as asked"
    if name is None:
        name = next(kind for kind, is_there in there.items() if is_there)
        threads = torch.get_num_threads()
        no_gpu = f"no GPU found, {threads} thread{'s' * (threads != 1)}"
        why = {"cuda": "", "mps": "Apple GPU", "cpu": no_gpu}[name]
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: not a device; use cuda, cuda:1, mps or cpu") from None
    if not there.get(device.type):
        raise ValueError(f"--device {name}: this machine or this torch has none; try --device cpu")
    if name == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {device}: this machine shows {torch.cuda.device_count()} GPUs, the first is "
            "cuda:0; each of its processes takes one"
        )
    return device, why or torch.cuda.get_device_name(device)


def pick_dtype(device: torch.device) -> str:
    """bfloat16 where the device computes in it, else float16 on CUDA, else float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device.type == "cpu" and _cpu_has_bf16():
        return "bfloat16"
    return "float32"


def _cpu_has_bf16():
    """Whether this CPU multiplies bf16 matrices in hardware (AVX512-BF16, AMX, Arm BF16)."""
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
        return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags) is not None
    return False


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """The device's peak in FLOP/s at this precision, None where it is not known."""
    if device.type != "cuda" or dtype not in ("bfloat16", "float16"):
        return None
    name = torch.cuda.get_device_name(device)
    other = r"(?! (PCIe|NVL|Ti|D|Laptop)\b)"  # a name that goes on so is another GPU's
    found = (peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b{other}", name))
    return next(found, None)


def peak_mb(device: torch.device) -> float | None:
    """The most memory that this process has held so far, in MB: tensors on a CUDA device, all that
    was resident elsewhere. None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    kilobyte = 1e6 if sys.platform == "darwin" else 1e3  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / kilobyte


def autocast(device: torch.device, dtype: str):
    """Mixed precision: matrix products in bf16 or fp16, weights and sums kept in float32."""
    if dtype in ("bfloat16", "float16"):
        return torch.autocast(device.type, getattr(torch, dtype))
    return contextlib.nullcontext()


def set_up_device(device: torch.device, thrifty: bool = False):
    """On CUDA: TF32 for the float32 products that autocast leaves. On a CPU: keep freed memory, or,
    where thrifty, give it back.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    elif device.type == "cpu":
        _set_up_malloc(thrifty)


def _set_up_malloc(thrifty):
    """Let glibc's malloc reuse what large tensors free instead of giving it back to the system,
    which would map and clear it anew in each step: a third of the time of training GPT-2 124M.

    It costs memory: what is freed leaves holes that not every tensor fits in. Thrifty, a tensor of
    1 MB or more has a mapping of its own, which goes when it does.
    """
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # names of mallopt(3)
    if thrifty:
        values = {trim_threshold: 2**17, mmap_threshold: 2**20, mmap_max: 2**16}
    else:
        values = {trim_threshold: -1, mmap_max: 0}
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        for name, value in values.items():
            libc.mallopt(name, value)


def human_time(seconds: float) -> str:
    """92 -> '1m32s'."""
    if not math.isfinite(seconds):
        return "?"
    seconds = int(seconds + 0.5)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
