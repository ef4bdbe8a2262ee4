"""The page: its numbers against transformers, what it refuses, and a real browser at it."""

import base64
import contextlib
import http.client
import json
import math
import operator
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import checkpoint
import playground
from config import GPT2_CONFIGS, GPT2Config
from convert import to_hf
from logger import run
from model import GPT2, context_start
from playground import attention, candidates, logit_lens, surprise
from quantize import to_int8
from sampling import Sampling, logits_to_probs, sample_text
from tokenizer import BPETokenizer, CharTokenizer

TEXT = "To be, or not to be: that is the question. 却说那一日天色已晚，😀 两个人慢慢走。\n"
TOKENIZER = BPETokenizer.train(TEXT * 3, 320)
SIZES = {"vocab_size": TOKENIZER.vocab_size, "block_size": 32, "n_layer": 3, "n_head": 2}


def sharp_model(**settings):
    """A random model whose heads and logits are far from uniform."""
    torch.manual_seed(1)
    model = GPT2(GPT2Config(**SIZES | {"n_embd": 32, "dropout": 0.0} | settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 8 if parameter.ndim == 2 else 1
    return model


def random_ids(count):
    return torch.randint(SIZES["vocab_size"], (count,), generator=torch.manual_seed(2)).tolist()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The path of a checkpoint of such a model."""
    path, model = tmp_path_factory.mktemp("model") / "small.pt", sharp_model()
    checkpoint.save(path, checkpoint.new_state(model.config, model.state_dict(), TOKENIZER))
    return path


# ---------------------------------------------------------------- the numbers


def test_attention_lens_and_candidates_are_those_of_transformers(saved, tmp_path):
    transformers = pytest.importorskip("transformers")
    to_hf(saved, tmp_path / "exported")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "exported", attn_implementation="eager"
    ).eval()
    ours, _ = checkpoint.load_model(saved, "cpu", "float32")
    ids = random_ids(20)
    with torch.no_grad():
        said = theirs(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
        last, norm = said.hidden_states[-1], theirs.transformer.ln_f  # the last one is normed
        states = [*map(norm, said.hidden_states[1:-1]), last]
        lens = torch.cat([theirs.lm_head(state) for state in states])
    weights = torch.cat(said.attentions)  # (L, H, T, T)
    assert weights.max() > 0.9 and (attention(ours, ids) - weights).abs().max() < 1e-5
    torch.testing.assert_close(attention(ours, ids, [3, -1]), weights[:, :, [3, -1]])
    assert (logit_lens(ours, ids).softmax(-1) - lens.softmax(-1)).abs().max() < 1e-5
    torch.testing.assert_close(logit_lens(ours, ids, [3, 7]), lens[:, [3, 7]], rtol=1e-5, atol=1e-4)
    order, before, _ = candidates(ours, ids)
    assert (before - said.logits[0, -1].softmax(-1)[order]).abs().max() < 1e-5
    log_p = said.logits[0].log_softmax(-1)
    bits = [-log_p[place - 1, token] / math.log(2) for place, token in enumerate(ids)][1:]
    torch.testing.assert_close(surprise(ours, ids)[1:], torch.stack(bits), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("position", ["learned", "rope", "alibi"])
def test_attention_times_values_is_what_goes_into_c_proj(position):
    model, ids, seen = sharp_model(position=position), random_ids(30), {}
    attn = model.transformer.h[1].attn
    attn.c_attn.register_forward_hook(lambda *args: seen.update(v=args[-1].chunk(3, -1)[2][0]))
    attn.c_proj.register_forward_pre_hook(lambda _, inputs: seen.update(y=inputs[0][0]))
    weights = attention(model, ids)[1]  # (H, T, T)
    v = seen["v"].view(30, 2, 16).transpose(0, 1)  # (H, T, D)
    torch.testing.assert_close((weights @ v).transpose(0, 1).reshape(30, 32), seen["y"])
    assert weights.triu(1).abs().max() == 0 and not model.transformer.h[0]._forward_hooks


def test_an_int8_model_can_be_looked_into():
    model, ids = to_int8(sharp_model()), random_ids(20)
    weights, lens = attention(model, ids), logit_lens(model, ids)
    with torch.no_grad():
        assert (lens[-1] - model(torch.tensor([ids]))[0]).abs().mean() < 0.02
    assert (weights - attention(sharp_model(), ids)).abs().mean() < 0.02
    assert surprise(model, ids).isfinite().all() and candidates(model, ids)[0].shape == (320,)


def test_surprise_past_block_size_is_that_of_the_window_that_the_model_saw():
    model, ids = sharp_model(), random_ids(90)
    bits = surprise(model, ids)
    for place in range(1, 90):
        window = torch.tensor([ids[context_start(place, 32) : place]])
        with torch.no_grad():
            p = model(window)[0][0, -1].softmax(-1)
        assert bits[place].item() == pytest.approx(-math.log2(p[ids[place]]), rel=1e-4)
        assert candidates(model, ids[:place])[1][0].item() == pytest.approx(
            p.max().item(), rel=1e-4
        )


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0}, {"temperature": 2, "top_k": 3}, {"top_p": 0.5}]
)
def test_what_can_be_drawn_has_the_chances_with_which_it_is_drawn(settings):
    model, sampling = sharp_model(), Sampling(**settings)
    order, before, after = candidates(model, random_ids(9), sampling)
    assert before.sum().item() == pytest.approx(1) and after.sum().item() == pytest.approx(1)
    assert before.diff().max() <= 0 and sorted(order.tolist()) == list(range(len(order)))
    if not sampling.temperature:
        assert after.tolist() == [1.0] + [0.0] * (len(order) - 1)
        return
    p, ids = logits_to_probs(before.log()[None], sampling)
    assert torch.equal(ids[0], torch.arange(len(p[0])))
    torch.testing.assert_close(after[: len(p[0])], p[0] / p.sum())


# ---------------------------------------------------------------- the server


class Page(SimpleNamespace):
    """A running `python playground.py`: its port, its process and what it has said."""

    def ask(self, path, body=None, method=None, **headers):
        """The status and the body of the answer; body: bytes, or what becomes JSON."""
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method or ("GET" if raw is None else "POST"), path, raw, names)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def write(self, **body):
        """Status, and ids and text of a stream."""
        status, stream = self.ask("/write", body)
        events = [
            json.loads(line[6:]) for line in stream.decode().split("\n\n") if status == 200 and line
        ]
        return (
            status,
            [i for event in events for i in event["ids"]],
            events[-1].get("text") if events else None,
        )

    def memory(self):
        found = re.search(
            r"VmRSS:\s+(\d+)", (ROOT / f"/proc/{self.process.pid}/status").read_text()
        )
        return int(found[1]) / 1000


@contextlib.contextmanager
def served(path, folder):
    """A page for a checkpoint, started as a person does."""
    pytest.importorskip("uvicorn"), pytest.importorskip("starlette")
    log, flags = folder / "stderr", ["--port", "0", "--device", "cpu", "--dtype", "float32"]
    command = [sys.executable, str(ROOT / "playground.py"), "--checkpoint", str(path), *flags]
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stderr=stderr, cwd=folder)
    try:
        for _ in range(600):
            found = re.search(r"http://127.0.0.1:(\d+)", log.read_text())
            if found or process.poll() is not None:
                break
            time.sleep(0.1)
        assert found, log.read_text()
        yield Page(port=int(found[1]), process=process)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert len(log.read_text().splitlines()) == 3, log.read_text()  # no traceback, no warning
    finally:
        process.kill()


@pytest.fixture(scope="module")
def page(saved, tmp_path_factory):
    with served(saved, tmp_path_factory.mktemp("page")) as page:
        yield page


def test_the_same_seed_gives_the_text_of_generate_py(page, saved):
    model, tokenizer = checkpoint.load_model(saved, "cpu", "float32")
    for settings in ({}, {"seed": 7, "temperature": 1.5, "top_p": 0.9}, {"stop": "e"}):
        for prompt in ("To be", "", "两个人"):
            expected = sample_text(model, tokenizer, prompt, 80, **settings)
            status, ids, text = page.write(text=prompt, max_new_tokens=80, **settings)
            assert (status, prompt + text) == (200, expected)
            assert tokenizer.decode(ids).startswith(expected.removesuffix("\ufffd")) or not prompt


def test_what_the_page_is_told_is_what_the_functions_return(page, saved):
    model, tokenizer = checkpoint.load_model(saved, "cpu", "float32")
    ids = tokenizer.encode(TEXT * 2)
    assert len(ids) > 32
    status, said = page.ask("/read", {"ids": ids})
    read = json.loads(said)
    assert status == 200 and read["ids"] == ids and read["start"] == context_start(len(ids), 32)
    assert read["bits"] == pytest.approx(surprise(model, ids).tolist(), abs=1e-5)
    for place in (1, 20, 40, len(ids)):
        look = json.loads(page.ask("/look", {"ids": ids, "place": place, "top_k": 5})[1])
        order, before, after = candidates(model, ids[:place], Sampling(top_k=5))
        rows = list(zip(order.tolist(), before.tolist(), after.tolist(), strict=True))
        rank = look["rank"]
        shown = rows[:10] + ([rows[rank]] if (rank or 0) >= 10 else [])
        for found, row in zip(look["candidates"], shown, strict=True):
            assert found == pytest.approx(row, abs=1e-6)
        assert look["kept"] == 5
        assert rank is None if place == len(ids) else rows[rank][0] == ids[place]
        end = min(place + 1, len(ids))
        start = context_start(end, 32)
        weights = attention(model, ids[start:end])[:, :, -1].flatten()
        sent = torch.frombuffer(bytearray(base64.b64decode(look["attention"])), dtype=torch.float32)
        assert look["start"] == start and (sent - weights).abs().max() < 1e-6
        lens = logit_lens(model, ids[context_start(place, 32) : place])[:, -6:]
        assert torch.equal(torch.tensor(look["said"]), lens.argmax(-1))
        torch.testing.assert_close(torch.tensor(look["chance"]), lens.softmax(-1).amax(-1))


def text_of(**more):
    return {"text": "To be", "max_new_tokens": 3} | more


MARKUP = "<script>alert(1)</script><img src=x onerror=alert(1)>"
HOSTILE = {
    # another host, another origin
    **{f"host {host!r}": ("GET", "/facts", None, {"Host": host}, 400)
       for host in ("evil.example", "127.0.0.1.evil.example", "evil.example:80", "", "10.0.0.1")},
    "host of a rebound name": ("POST", "/read", text_of(), {"Host": "evil.example"}, 400),
    **{f"origin {origin}": ("POST", "/write", text_of(), {"Origin": origin}, 403)
       for origin in ("http://evil.example", "null", "https://127.0.0.1", "http://127.0.0.1:1",
                      "http://localhost", "file://", "chrome-extension://x")},
    "origin and read": ("POST", "/read", text_of(), {"Origin": "http://evil.example"}, 403),
    "origin and look": ("POST", "/look", text_of(), {"Origin": "http://evil.example"}, 403),
    # what is no JSON, or another JSON
    **{f"body {body[:12]!r}": ("POST", "/read", body, {}, 400)
       for body in (b"", b"{", b"[]", b"null", b'"text"', b"NaN", b"\xff\xfe{}", b"\0" * 9,
                    b"[" * 100_000, b'{"place": ' + b"9" * 5000 + b"}", b'{"text": "\\ud800"}',
                    b'{"text": 1}', b'{"text": "x", "other": 1}', b'{"ids": "x"}')},
    # settings out of range
    **{f"{name} {value!r}": ("POST", "/write", text_of(**{name: value}), {}, 400)
       for name, value in [
           ("temperature", -1), ("temperature", math.nan), ("temperature", math.inf),
           ("temperature", "1"), ("temperature", None), ("top_k", 0), ("top_k", -5), ("top_k", 1.5),
           ("top_p", 0), ("top_p", 1.5), ("top_p", math.nan), ("max_new_tokens", -1),
           ("max_new_tokens", 10**9), ("seed", -1), ("seed", True), ("stop", ""), ("place", -1),
           ("ids", [-1]), ("ids", [10**6]), ("ids", [10**30]), ("ids", [1.5]), ("ids", [True]),
           ("ids", [[1]])]},
    # what is too large
    "a text of 1 MB": ("POST", "/write", text_of(text="x" * 10**6), {}, 413),
    "a body of 30 MB": ("POST", "/read", b" " * 30_000_000, {}, 413),
    "3,000 tokens": ("POST", "/read", {"ids": [1] * 3000}, {}, 400),
    "200,000 letters": ("POST", "/write", text_of(text="\x01" * 40_000), {}, 400),
    "a header of 200 KB": ("GET", "/", None, {"X": "x" * 200_000}, 400),
    "a path of 200 KB": ("GET", "/" + "x" * 200_000, None, {}, 400),
    # other paths and methods
    **{path: ("GET", path, None, {}, 404) for path in
       ("/../config.py", "/%2e%2e/config.py", "//etc/passwd", "/playground.py", "/docs")},
    "GET /write": ("GET", "/write", None, {}, 405),
    "PUT /read": ("PUT", "/read", text_of(), {}, 405),
    "a method of its own": ("EVIL", "/look", text_of(), {}, 405),
    # what is unusual and right
    "markup": ("POST", "/read", text_of(text=MARKUP), {}, 200),
    "control characters": ("POST", "/read", text_of(text="\0\x1b[31m\r\n\u202e"), {}, 200),
    "a place far away": ("POST", "/look", text_of(place=10**30), {}, 200),
    "nothing at all": ("POST", "/write", {"max_new_tokens": 2}, {}, 200),
    "the end of a text, said in a text": ("POST", "/read", text_of(text="<|endoftext|>"), {}, 200),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_stranger_sends_is_answered_or_refused_in_a_line(page, name):
    method, path, body, headers, expected = HOSTILE[name]
    hangs_up = [ConnectionError] if "KB" in name or "MB" in name else []  # on what is too large
    with contextlib.suppress(*hangs_up):
        status, said = page.ask(path, body, method, **headers)
        assert status == expected
        if status >= 400:
            assert len(said) < 300 and b"\n" not in said.strip() and b"Traceback" not in said
        elif name == "markup":
            assert TOKENIZER.decode(json.loads(said)["ids"]) == MARKUP
    assert page.write(**text_of())[0] == 200


def test_there_are_fifty_of_them():
    assert len(HOSTILE) >= 50


def test_a_body_without_a_length_is_cut_off(page):
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=60)
    parts = (b" " * 10_000 for _ in range(100))
    with contextlib.closing(connection), contextlib.suppress(ConnectionError):
        connection.request(
            "POST", "/read", parts, encode_chunked=True, headers={"Transfer-Encoding": "chunked"}
        )
        assert connection.getresponse().status == 413
    assert page.write(**text_of())[0] == 200


def test_twenty_at_once_and_readers_who_leave_cost_no_memory(page):
    def leave():
        """Ask for a long text and hang up after its first tokens."""
        with socket.create_connection(("127.0.0.1", page.port)) as client:
            body = json.dumps({"text": "To be", "max_new_tokens": 2048})
            head = f"POST /write HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall((head + body).encode())
            assert client.recv(1000).startswith(b"HTTP/1.1 200")

    def at_once():
        statuses = []
        crowd = [
            threading.Thread(target=lambda: statuses.append(page.write(**text_of())[0]))
            for _ in range(20)
        ]
        for work in (threading.Thread.start, threading.Thread.join):
            for thread in crowd:
                work(thread)
        assert len(statuses) == 20 and set(statuses) <= {200, 503} and statuses.count(200) >= 16

    before = 0
    for turn in range(8):
        at_once()
        began = time.monotonic()
        leave()
        assert page.write(**text_of())[0] == 200  # at once, and not after 2,048 tokens
        assert time.monotonic() - began < 10
        before = page.memory() if turn == 3 else before
    assert page.memory() < before + 10


@pytest.mark.slow
def test_requests_that_never_come_keep_no_place(page):
    head = b"POST /read HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n"
    with contextlib.ExitStack() as clients:
        for _ in range(playground.AT_ONCE):
            client = clients.enter_context(socket.create_connection(("127.0.0.1", page.port)))
            client.sendall(head)
        time.sleep(1)
        assert page.ask("/facts")[0] == 503
        assert client.recv(1000).startswith(b"HTTP/1.1 400")
        assert page.write(**text_of())[0] == 200


def test_what_is_wrong_is_one_line(saved, tmp_path, monkeypatch, capsys):
    flags = ["--checkpoint", str(saved), "--device", "cpu"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run(playground.main, [*flags, "--port", port]) == 2
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run(playground.main, flags) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ") and port in first and "--port 0" in first
    assert second.startswith("error: ") and "pip install -r requirements-web.txt" in second


# ---------------------------------------------------------------- a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium, in English."""
    programs = [shutil.which("chromium"), shutil.which("chromedriver")]
    if None in programs:
        pytest.skip("needs chromium and chromedriver (apt-get install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    folder = tmp_path_factory.mktemp("browser")
    for flag in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        *("no-proxy-server", "lang=en", f"user-data-dir={folder}", "window-size=1280,900"),
    ):
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(programs[1])
    with webdriver.Chrome(options=options, service=service) as driver:
        driver.implicitly_wait(10)
        yield driver


@pytest.fixture
def reader(browser, page):
    """What a person does with a freshly loaded page; the console must stay empty."""
    browser.get(f"http://127.0.0.1:{page.port}/")
    yield Reader(browser)
    assert browser.get_log("browser") == []


class Reader:
    def __init__(self, browser):
        self.browser = browser
        self.until(lambda: self.js("return Boolean(document.querySelector('#settings input'))"))

    def js(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def until(self, condition):
        for _ in range(300):
            if found := condition():
                return found
            time.sleep(0.05)
        raise AssertionError(f"never came: {self.js('return document.body.innerText')}")

    def find(self, selector):
        return self.browser.find_element("css selector", selector)

    def all(self, selector):
        return self.js(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector
        )

    def text(self):
        return self.js("return document.querySelector('#text').value")

    def type(self, text):
        self.find("#text").click()
        self.browser.execute_cdp_cmd("Input.insertText", {"text": text})
        self.until(lambda: "tokens" in self.find("#status").text)

    def set(self, name, value):
        field = self.find(f"#set-{name}")
        field.clear()
        field.send_keys(str(value))

    def write(self):
        self.find("#write").click()
        self.until(self.has_written)

    def has_written(self):
        """Whether the text has been written and read, and the page awaits what comes next."""
        return "next?" in self.find("#which").text and "a second" in self.find("#status").text

    def choose(self, offset):
        """Put the cursor before a character, as the arrow keys would, and wait for the panel."""
        self.js("document.querySelector('#panel').ariaBusy = 'true'")
        self.js("document.querySelector('#text').focus()")
        self.js("document.activeElement.setSelectionRange(...arguments)", offset, offset)
        self.until(lambda: self.all("#mirror .chosen") and self.all("#panel[aria-busy=false] *"))

    def show(self, tab):
        self.find(f"#tab-{tab}").click()
        return self.until(lambda: self.all("#panel *"))


def percent(p):
    return f"{100 * p:.2f} %" if p >= 0.0001 or p == 0 else "< 0.01 %"


def test_a_reader_writes_looks_inside_and_takes_a_branch(reader, saved):
    model, tokenizer = checkpoint.load_model(saved, "cpu", "float32")
    reader.type("To be, 却😀")
    reader.set("max_new_tokens", 40)
    reader.set("top_k", 7)
    reader.write()
    assert reader.text() == sample_text(model, tokenizer, "To be, 却😀", 40, top_k=7)
    assert "".join(reader.all("#mirror span")).rstrip("\u200b") == reader.text()
    ids = tokenizer.encode("To be, 却😀")
    place = len(tokenizer.encode("To be,"))
    reader.choose(len("To be,"))
    assert f"token {place + 1} of" in reader.find("#which").text
    order, before, after = candidates(model, ids[:place], Sampling(top_k=7))
    expected = [percent(p) for pair in zip(before, after, strict=True) for p in pair]
    assert reader.all("#panel .chance")[:20] == expected[:20]
    assert reader.all("tr.drawn button") and "7 can be drawn" in reader.find("#panel").text

    reader.show("attention")
    reader.js("const s = document.querySelector('#layer'); s.value = 1; s.onchange()")
    reader.js("const s = document.querySelector('#head'); s.value = 0; s.onchange()")
    weights = attention(model, ids[: place + 1])[1, 0, -1].sort(descending=True).values
    shown = [cell for cell in reader.all("#panel td") if "%" in cell]
    assert shown == [percent(p) for p in weights[:6]]

    reader.show("layers")
    said = logit_lens(model, ids[:place])[:, -6:].argmax(-1)
    assert len(reader.all("#lens tr")) == 1 + len(said)
    for cell, token in zip(reader.all("#lens td"), said.flatten().tolist(), strict=True):
        alone = tokenizer.decode_bytes([token]).decode("utf-8", "backslashreplace")
        assert cell.replace("␣", " ").replace("↵", "\n") == alone

    assert "parameters" in reader.show("model")[0]
    counts = [int(n.replace(",", "")) for n in reader.all(".part > span:not(.soft)")]
    blocks = counts[2:-1]
    assert counts[0] + counts[1] + 3 * sum(blocks) + counts[-1] == model.num_params()

    reader.show("token")
    long = reader.text()
    reader.find("#panel tr:nth-child(3) button").click()
    reader.until(lambda: reader.text() != long)
    assert reader.text() == tokenizer.decode([*ids[:place], order[1].item()])
    reader.find("#undo").click()
    reader.until(lambda: reader.text() == long)


def test_a_character_of_several_tokens_is_one_piece_whose_parts_can_be_chosen(reader):
    text = "龍 <b>x</b><img src=x>"  # not in the tokenizer's text: three bytes
    assert len(TOKENIZER.encode("龍")) == 3
    reader.type(text)
    assert reader.all("#mirror span")[0] == "龍" and not reader.all("#mirror :is(b, img)")
    assert "".join(reader.all("#mirror span")).rstrip("\u200b") == text
    reader.choose(0)
    assert (
        reader.find("#which").text.startswith("\\xe9")
        and "part of 龍" in reader.find("#which").text
    )
    reader.find("#next").click()
    reader.until(lambda: "token 2 of" in reader.find("#which").text)
    assert reader.js("return document.querySelector('#mirror .chosen').textContent") == "龍"


def test_the_keyboard_is_enough_a_long_text_stops_and_what_is_not_seen_is_grey(reader):
    from selenium.webdriver.common.keys import Keys

    reader.set("max_new_tokens", 2048)
    reader.type("To be")
    reader.find("#text").send_keys(Keys.CONTROL, Keys.ENTER)
    reader.until(lambda: len(reader.text()) > 50)
    reader.find("#text").send_keys(Keys.ESCAPE)
    reader.until(reader.has_written)
    written = int(re.search(r"^([\d,]+) tokens", reader.find("#status").text)[1])
    assert 0 < written < 2048 and reader.all("#mirror .unseen")
    kept = reader.text()
    reader.set("max_new_tokens", 5)
    reader.find("#text").send_keys(Keys.CONTROL, Keys.ENTER)  # goes on from there
    reader.until(lambda: reader.text() != kept and reader.has_written())
    assert reader.text().startswith(kept.rstrip("\ufffd"))
    reader.find("#tab-token").click()
    reader.browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert reader.browser.switch_to.active_element.get_attribute("id") == "tab-attention"


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_can_be_read_in_both_languages_at_any_width_and_in_the_dark(reader, width, theme):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    reader.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": theme}]
    reader.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    reader.type("To be, or not")
    english = reader.js("return document.body.innerText")
    reader.choose(4)
    for tab in ("token", "attention", "layers", "model"):
        reader.show(tab)
        assert reader.js("return document.documentElement.scrollWidth") <= width, tab
    reader.find("#language").click()
    assert reader.js("return document.documentElement.lang") == "zh"
    chinese = reader.js("return document.body.innerText")
    assert not re.search("Write|Undo|surprised|Attention", chinese) and "续写" in chinese
    assert "Write" in english and "续写" not in english
    unnamed = "button, input, select, textarea, section, [role=tablist], [role=tabpanel], canvas"
    names = (
        "e => e.labels?.length || e.ariaLabel || e.innerText || e.getAttribute('aria-labelledby')"
    )
    every = f"[...document.querySelectorAll('{unnamed}')]"
    assert reader.js(f"return {every}.filter(e => !({names})(e)).map(e => e.id)") == []
    for name, background, share in [
        *(("ink", "card", None), ("soft", "card", None), ("soft", "page", None)),
        *(("on-accent", "accent", None), ("bad", "card", None), ("accent", "card", None)),
        *(("ink", "card", ("surprise", 0.55)), ("ink", "card", ("attention", 0.55))),
        *(("soft", "card", ("surprise", 0.55 / 3)), ("soft", "card", ("attention", 0.55 / 3))),
    ]:
        under = colour(reader, background)
        if share:
            tint, amount = colour(reader, share[0]), share[1]
            under = [amount * t + (1 - amount) * u for t, u in zip(tint, under, strict=True)]
        assert contrast(colour(reader, name), under) >= 4.5, (name, background, share)


def colour(reader, name):
    """The red, green and blue of one of the page's colours, 0 to 255."""
    found = reader.js(
        f"return getComputedStyle(document.documentElement).getPropertyValue('--{name}')"
    )
    if "#" in found:
        return [int(found.strip()[i : i + 2], 16) for i in (1, 3, 5)]
    return [int(part) for part in found.split(",")]


def contrast(one, other):
    """WCAG 2.1's contrast ratio."""

    def luminance(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in
                  (channel / 255 for channel in color)]  # fmt: skip
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.slow
def test_writing_on_the_page_is_as_fast_as_generate_py(browser, tmp_path):
    """On a quiet machine, the model that `train.py` makes for a CPU; -s shows the numbers."""
    torch.manual_seed(1)
    sizes = GPT2_CONFIGS["shakespeare-cpu"].items()
    names = ("n_layer", "n_head", "n_embd", "block_size")
    tokenizer = CharTokenizer.train(map(chr, range(32, 97)))
    config = GPT2Config(**{k: v for k, v in sizes if k in names}, vocab_size=65)
    model, path = GPT2(config).eval(), tmp_path / "small.pt"
    checkpoint.save(path, checkpoint.new_state(config, model.state_dict(), tokenizer))
    rates, count = {"generate.py": [], "stream": [], "page": []}, 2000
    with served(path, tmp_path) as page:
        browser.get(f"http://127.0.0.1:{page.port}/")
        reader = Reader(browser)
        reader.js(FIRST_TOKEN)
        for _ in range(5):
            began = time.perf_counter()
            sample_text(model, tokenizer, "TO BE", count)
            rates["generate.py"].append(count / (time.perf_counter() - began))
            began = time.perf_counter()
            assert len(page.write(text="TO BE", max_new_tokens=count)[1]) == count + 5
            rates["stream"].append(count / (time.perf_counter() - began))
            reader.js("document.querySelector('#text').value = ''")
            reader.type("TO BE")
            reader.set("max_new_tokens", count)
            reader.find("#text").send_keys("\ue009\ue007")  # Ctrl, Enter
            reader.until(reader.has_written)
            rates["page"].append(int(re.search(r"(\d+) a second", reader.find("#status").text)[1]))
        firsts = reader.js("return firsts")
    shares = {
        name: statistics.median(map(operator.truediv, found, rates["generate.py"]))
        for name, found in rates.items()
    }
    print("\nof generate.py's tokens/s", {name: round(share, 2) for name, share in shares.items()})
    print("first token after ms", [round(first) for first in firsts])
    assert len(firsts) == 5 and sorted(firsts)[2] < 300
    assert shares["stream"] >= 0.9 and shares["page"] >= 0.9


# milliseconds from the key to the picture that has the first new text
FIRST_TOKEN = """
window.firsts = [];
document.addEventListener("keydown", event => {
  if (event.key !== "Enter") return;
  const began = performance.now(), mirror = document.querySelector("#mirror");
  const length = mirror.textContent.length;
  const watch = () => mirror.textContent.length > length
    ? firsts.push(performance.now() - began) : requestAnimationFrame(watch);
  requestAnimationFrame(watch);
}, true);
"""
