"""What the tests share: where the code is, tiny data sets and configs, the GPT-2 vocabulary."""

import contextlib
import http.server
import os
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.append(str(ROOT / "docs"))  # the works of bench.py
# One thread for this process and its children: tiny models run fastest so, workers share the cores,
# and OpenMP's threads do not survive a fork.
os.environ["OMP_NUM_THREADS"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

import pytest  # noqa: E402
import torch  # noqa: E402

from config import GPT2Config  # noqa: E402

TEXT = "".join(
    f"line {i}: the quick brown fox jumps over the lazy dog {i * i}.\n" for i in range(120)
)


def pytest_configure(config):
    """Without `-m gpu` all tests run on the CPU, also where there is a GPU."""
    if not config.option.markexpr.startswith("gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_xdist_auto_num_workers(config):
    """Two share the suite; a file, what is to be seen with -s, and a GPU's tests are run here."""
    alone = config.option.capture == "no" or config.option.markexpr.startswith("gpu")
    return 2 if all(Path(arg).is_dir() for arg in config.args) and not alone else 0


def same(one, other):
    """Whether two nests of containers hold equal values and equal tensors, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def in_child(function, *arguments):
    """Call function in a forked child; its exit code, negative for a signal (SIGALRM: it hung)."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(function, *arguments), 0)[1])


def in_processes(count, function, *arguments):
    """The exit codes of `count` children, as in_child's, that find each other as under torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def member(rank):
        place = f"MASTER_ADDR=127.0.0.1 MASTER_PORT={port} TORCHELASTIC_RUN_ID=none"
        place += f" RANK={rank} LOCAL_RANK={rank} WORLD_SIZE={count}"
        os.environ.update(word.split("=") for word in place.split())
        return function(*arguments)

    pids = [fork(member, rank) for rank in range(count)]
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def fork(function, *arguments):
    """The process id of a child that calls function and exits with what it returns."""
    import torch._dynamo  # what optimizers and logs import, more than a second: once,
    import torch.utils.tensorboard  # noqa: F401  # and not in every child

    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        signal.alarm(120)
        code = function(*arguments)
    except BaseException:  # the child must never return into pytest
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def server(name, body, status=200, length=None):
    """The address of a file on this machine that is answered so, and what was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if status is None:
                return  # and hang up
            self.send_response(status)
            self.send_header("Content-Length", str(length or len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/{name}", asked
        httpd.shutdown()


@pytest.fixture
def only_this_machine(monkeypatch):
    """No proxy between us and 127.0.0.1."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def gpt2_vocabulary():
    """Skips where tiktoken would have to download GPT-2's vocabulary."""
    beside = ROOT.parent / "shared" / "tiktoken"
    if "TIKTOKEN_CACHE_DIR" not in os.environ and beside.is_dir():
        os.environ["TIKTOKEN_CACHE_DIR"] = str(beside)
    cache = os.environ.get("TIKTOKEN_CACHE_DIR")
    if not cache or not list(Path(cache).glob("*")):
        pytest.skip("GPT-2's vocabulary is not in a local TIKTOKEN_CACHE_DIR")


def prepare(text, data_dir):
    """The folder of a prepared data set of the text's characters."""
    import prepare_data

    path = data_dir.with_suffix(".txt")
    path.write_text(text, "utf-8")
    flags = ["--input", str(path), "--tokenizer", "char", "--data_dir", str(data_dir)]
    assert prepare_data.main(flags) == 0
    return data_dir


@pytest.fixture(scope="module")
def short_samples():
    """Half of a tiny run's time is the text of each evaluation: 20 tokens of it show the same."""
    import train

    sample_text = train.sample_text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "sample_text", lambda *a, **settings: sample_text(*a[:3], 20))
        yield


@pytest.fixture
def tiny_config(tmp_path, short_samples):
    """A run of a few seconds: 2 layers of 32 channels, everything under tmp_path."""
    shape = {"block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32, "batch_size": 4}
    steps = {"gradient_accumulation_steps": 2, "max_iters": 20, "learning_rate": 1e-3}
    often = {"eval_interval": 10, "eval_iters": 4, "log_interval": 1}
    places = {"checkpoint_dir": str(tmp_path / "checkpoints"), "log_dir": str(tmp_path / "runs")}
    places |= {"data_dir": str(prepare(TEXT, tmp_path / "data"))}  # 6,900 characters
    return GPT2Config(**shape, **steps, **often, **places, device="cpu", dtype="float32")
