"""Make README's pictures from a real run: curves, TensorBoard, generate.py and playground.py.

    python prepare_data.py --dataset shakespeare && python train.py
    python docs/images/make_pictures.py                 # all of them
    python docs/images/make_pictures.py --only loss --log_dir runs --output /tmp

Needs the packages of requirements-dev.txt, a run in ./runs, its model in ./checkpoints and, for
what is seen in a browser, Chromium or Chrome, with chromedriver for playground.py. The curve is
that of the newest run.
"""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from files import atomic_write  # noqa: E402
from logger import log_row, run  # noqa: E402
from options import parse_args  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WINDOW = "1500,840"  # three charts side by side, and two
PATIENCE = 60  # seconds that a program may keep us waiting
COLUMNS = 80  # of the terminal
PROMPT = r"\n(?:\x1b\[[\d;?]*\w)*> "  # generate.py's, coloured or not
TYPED = ("ROMEO:", "/set temperature 0.5", "To be, or not to be")


# ---------------------------------------------------------------- the loss curve


def loss_curve(options) -> bytes:
    """An SVG of training and validation loss over steps (below) and seconds (above)."""
    import matplotlib
    from matplotlib.figure import Figure

    records = newest_records(options.log_dir)
    look = {"svg.hashsalt": "loss", "font.size": 13}  # the same run gives the same file
    look |= {f"figure.constrained_layout.{side}_pad": 0.12 for side in "wh"}  # inches
    with matplotlib.rc_context(look, ROOT / "notebooks" / "figures.mplstyle"):
        figure = Figure(figsize=(7.5, 4.2))
        draw_losses(figure.add_subplot(), records)
        picture = io.BytesIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue()


def newest_records(log_dir) -> list[dict]:
    """What the newest run logged, a dict a line; runs are named after their date."""
    found = [path for path in Path(log_dir).glob("*/metrics.jsonl") if path.stat().st_size]
    if not found:
        raise ValueError(f"--log_dir {log_dir}: no run in it; make one: python train.py")
    return [json.loads(line) for line in max(found).read_text("utf-8").splitlines()]


def draw_losses(axes, records):
    steps, losses = column(records, "step"), column(records, "loss")
    evaluated = [record for record in records if "val_loss" in record]
    val_steps, val_losses = column(evaluated, "step"), column(evaluated, "val_loss")
    axes.plot(steps, losses, gid="training", label="training", linewidth=1.2)
    label = f"validation (best: {min(val_losses):.2f})" if evaluated else None
    (line,) = axes.plot(val_steps, val_losses, "o-", gid="validation", label=label)
    line.set(clip_on=False, zorder=3)  # the last one stands on the edge
    axes.set(xlabel="step", ylabel="loss, nats a token", xlim=(0, steps[-1]))
    axes.legend()
    add_clock(axes, [0, *steps], [0, *column(records, "seconds")])


def column(records, name):
    return [record[name] for record in records]


def add_clock(axes, steps, seconds):
    """A second scale above: the seconds that had passed at each step."""
    from matplotlib.ticker import MaxNLocator
    from numpy import interp

    round_times = MaxNLocator(6).tick_values(0, seconds[-1])
    times = [time for time in round_times if time <= seconds[-1]]
    clock = axes.secondary_xaxis("top")
    clock.set_xticks(interp(times, seconds, steps), [f"{time:g}" for time in times])
    clock.set_xlabel("seconds")


# ---------------------------------------------------------------- TensorBoard


def tensorboard_page(options) -> bytes:
    """A PNG of TensorBoard's curves."""
    browser = find_browser(options)
    newest_records(options.log_dir)
    with tensorboard(options.log_dir) as address:
        return screenshot(browser, f"{address}#timeseries&_smoothingWeight=0")


def find_browser(options):
    browser = options.browser or next(filter(shutil.which, BROWSERS), "chromium")
    if shutil.which(browser) is None:
        raise ValueError(
            f"--browser {browser}: not found; apt-get install chromium, or name a Chrome's path"
        )
    return shutil.which(browser)


@contextlib.contextmanager
def tensorboard(log_dir):
    """The address of a TensorBoard on a free port of this machine, as soon as it has curves."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir)]
    command += ["--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = (re.search(r"http://127\S+", line) for line in process.stderr)
            address = next(filter(None, said), None)
            if address is None:
                raise ValueError("TensorBoard does not start: pip install -r requirements-dev.txt")
            wait_for_curves(address[0])
            yield address[0]
        finally:
            process.terminate()


def wait_for_curves(address):
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        with direct.open(f"{address}data/plugin/scalars/tags") as answer:
            if json.load(answer):
                return
        time.sleep(0.2)
    raise ValueError("TensorBoard finds no curves in the runs")


def screenshot(browser, address) -> bytes:
    """A PNG of the page as it is once its scripts have come to rest."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "page.png"
        command = [browser, "--headless=new", "--disable-gpu", "--hide-scrollbars"]
        command += ["--no-proxy-server", f"--user-data-dir={folder}", f"--window-size={WINDOW}"]
        command += ["--virtual-time-budget=15000", f"--screenshot={picture}"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.append("--no-sandbox")  # Chromium's sandbox refuses root
        command.append(address)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise ValueError(f"{browser} took more than {PATIENCE} seconds") from None
        if not picture.exists():
            reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
            raise ValueError(f"{browser} made no picture: {reason}")
        return picture.read_bytes()


# ---------------------------------------------------------------- the playground

# types a text, has it continued, and chooses the token before which the cursor is put
PLAY = """
const [text, cursor, done] = arguments, find = selector => document.querySelector(selector);
const until = (ready, next) => ready() ? next() : setTimeout(() => until(ready, next), 100);
until(() => find("#settings input"), () => {
  find("#text").value = text;
  find("#text").dispatchEvent(new Event("input"));
  find("#write").click();
  until(() => find("#status").textContent.includes("a second"), () => {
    for (const turn of [1, 2]) find("#language").click();  // says the length again, not the speed
    find("#text").focus();
    find("#text").setSelectionRange(cursor, cursor);
    until(() => find("tr.drawn"), () => { find("#text").blur(); scrollTo(0, 0); done(); });
  });
});
"""


def playground(options) -> bytes:
    """A PNG of playground.py: a text that the model has written, and one of its tokens."""
    from selenium import webdriver

    chrome, driver = webdriver.ChromeOptions(), shutil.which("chromedriver")
    chrome.binary_location = find_browser(options)
    if driver is None:
        raise ValueError("chromedriver is missing: apt-get install chromium-driver")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "no-proxy-server", "hide-scrollbars"):
        chrome.add_argument(f"--{flag}")
    command = [sys.executable, str(ROOT / "playground.py"), "--port", "0"]
    command += [] if options.checkpoint is None else ["--checkpoint", options.checkpoint]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = ""
            while (found := re.search(r"http://127\S+", said)) is None:
                if not (line := process.stderr.readline()):
                    raise ValueError(f"playground.py does not start: {said.split('error: ')[-1]}")
                said += line
            service = webdriver.ChromeService(driver)
            with webdriver.Chrome(options=chrome, service=service) as page:
                page.set_window_size(1280, 940)
                page.set_script_timeout(PATIENCE)
                page.get(found[0])
                page.execute_async_script(PLAY, "ROMEO:\nShall I", 62)
                return page.get_screenshot_as_png()
        finally:
            process.terminate()


# ---------------------------------------------------------------- the terminal


def terminal(options) -> bytes:
    """An SVG of a terminal in which somebody types TYPED into generate.py --interactive."""
    flags = ["--interactive", "--max_new_tokens", "120"]
    if options.checkpoint is not None:
        flags += ["--checkpoint", options.checkpoint]
    return screen(f"$ python generate.py {' '.join(flags)}\n{session(flags)}").encode()


def session(flags) -> str:
    """All that generate.py shows in a terminal while the lines of TYPED are typed into it."""
    import pexpect

    shown = io.StringIO()
    place = {"encoding": "utf-8", "dimensions": (24, COLUMNS), "timeout": PATIENCE}
    place["env"] = os.environ | {"TERM": "xterm-256color", "NO_COLOR": ""}
    with pexpect.spawn(sys.executable, [str(ROOT / "generate.py"), *flags], **place) as child:
        child.logfile_read = shown
        try:
            for line in (*TYPED, "/quit"):
                child.expect(PROMPT)
                child.sendline(line)
            child.expect(pexpect.EOF)
        except (pexpect.EOF, pexpect.TIMEOUT):
            plain = re.sub(r"\x1b\[[\d;?]*\w", "", shown.getvalue())
            why = " ".join(plain.split("error: ")[-1].split()) or "nothing was shown"
            raise ValueError(f"generate.py --interactive does not ask for a line: {why}") from None
    return shown.getvalue()


def screen(shown: str) -> str:
    """An SVG of what a terminal shows: colours kept, longer lines broken where it breaks them."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=COLUMNS, file=io.StringIO(), legacy_windows=False)
    for line in shown.replace("\r\n", "\n").removesuffix("\n").split("\n"):
        text = Text.from_ansi(line)
        console.print(*text.divide(range(COLUMNS, len(text), COLUMNS)), sep="\n", highlight=False)
    svg = console.export_svg(title="generate.py", unique_id="terminal")
    return re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # would ask another site


# ---------------------------------------------------------------- the command line

PICTURES = {
    "loss": ("loss.svg", loss_curve),
    "tensorboard": ("tensorboard.png", tensorboard_page),
    "terminal": ("terminal.svg", terminal),
    "playground": ("playground.png", playground),
}


@dataclass
class Options:
    # what to draw, and from what
    only: list[Literal[tuple(PICTURES)]] | None = None  # some of the pictures; unset: all
    log_dir: str = "runs"  # where the runs are
    checkpoint: str | None = None  # for terminal and playground; unset: the best of ./checkpoints
    browser: str | None = None  # for the screenshot; unset: Chromium or Chrome on the PATH
    output: str | None = None  # the folder for the pictures; unset: docs/images


def main(argv=None) -> int:
    options = parse_args(Options, argv, __doc__)
    for name in options.only or PICTURES:
        file, make = PICTURES[name]
        try:
            content = make(options)
        except ImportError as error:
            raise ValueError(
                f"{error.name} is missing: pip install -r requirements-dev.txt"
            ) from None
        path = Path(options.output or HERE) / file
        with atomic_write(path) as opened:
            opened.write(content)
        log_row("wrote", f"{path}, {len(content) / 1e3:.0f} kB", "green")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
