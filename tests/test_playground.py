"""The page: its numbers against transformers, what it refuses, and a real browser at it."""

import base64
import contextlib
import http.client
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import checkpoint
import playground
from config import GPT2Config
from convert import to_hf
from logger import run
from model import GPT2, context_start
from playground import attention, candidates, logit_lens, surprise
from quantize import to_int8
from sampling import Sampling, logits_to_probs, sample_text
from tokenizer import BPETokenizer

TEXT = "To be, or not to be: that is the question. 却说那一日天色已晚，😀 两个人慢慢走。\n"
TOKENIZER = BPETokenizer.train(TEXT * 3, 320)
SIZES = {"vocab_size": TOKENIZER.vocab_size, "block_size": 32, "n_layer": 3, "n_head": 2}


def sharp_model(**settings):
    """Random, with heads and logits far from uniform."""
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
    path, model = tmp_path_factory.mktemp("model") / "small.pt", sharp_model()
    checkpoint.save(path, checkpoint.new_state(model.config, model.state_dict(), TOKENIZER))
    return path


def test_attention_lens_and_candidates_are_those_of_transformers(saved, tmp_path):
    theirs = pytest.importorskip("transformers").GPT2LMHeadModel
    to_hf(saved, tmp_path)
    theirs = theirs.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ours, ids = sharp_model(), random_ids(20)
    with torch.no_grad():
        said = theirs(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
        *states, last = said.hidden_states[1:]  # the last one is normed
        lens = theirs.lm_head(torch.cat([*map(theirs.transformer.ln_f, states), last]))  # (L, T, V)
    weights = torch.cat(said.attentions)  # (L, H, T, T)
    assert weights.max() > 0.9 and (attention(ours, ids) - weights).abs().max() < 1e-5
    torch.testing.assert_close(attention(ours, ids, [3, -1]), weights[:, :, [3, -1]])
    torch.testing.assert_close(logit_lens(ours, ids), lens, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logit_lens(ours, ids, [3, 7]), lens[:, [3, 7]], rtol=1e-5, atol=1e-4)
    order, before, _ = candidates(ours, ids)
    assert (before - said.logits[0, -1].softmax(-1)[order]).abs().max() < 1e-5


@pytest.mark.parametrize("position", ["rope", "alibi"])
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
    model, whole, ids = to_int8(sharp_model()), sharp_model(), random_ids(20)
    for look in (attention, lambda *both: logit_lens(*both).softmax(-1), surprise):
        error = (look(model, ids) - look(whole, ids)).abs().mean()
        assert error < 0.02 * look(whole, ids).abs().max()


def test_surprise_past_block_size_is_that_of_the_window_that_the_model_saw():
    model, ids = sharp_model(), random_ids(90)
    bits = surprise(model, ids)
    for place in range(1, 90):
        window = torch.tensor([ids[context_start(place, 32) : place]])
        with torch.no_grad():
            p = model(window)[0][0, -1].softmax(-1)
        assert bits[place].item() == pytest.approx(-math.log2(p[ids[place]]), rel=1e-4)
        torch.testing.assert_close(candidates(model, ids[:place])[1][0], p.max())


@pytest.mark.parametrize("more", [{}, {"temperature": 0}, {"temperature": 2, "top_k": 3}])
def test_what_can_be_drawn_has_the_chances_with_which_it_is_drawn(more):
    model, sampling = sharp_model(), Sampling(**{"top_p": 0.5} | more)
    order, before, after = candidates(model, random_ids(9), sampling)
    assert before.sum().item() == pytest.approx(1) and after.sum().item() == pytest.approx(1)
    assert before.diff().max() <= 0 and sorted(order.tolist()) == list(range(len(order)))
    p, _ = logits_to_probs(before.log()[None], sampling)
    torch.testing.assert_close(after[: len(p[0])], p[0] / p.sum())
    assert sampling.temperature or after[0] == 1


class Page(SimpleNamespace):
    """A running `python playground.py`: its port and its process."""

    def ask(self, path, body=None, method=None, **headers):
        """The status and the body of the answer; body: bytes, parts, or what becomes JSON."""
        raw = json.dumps(body).encode() if isinstance(body, dict) else body
        method = method or ("GET" if raw is None else "POST")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, raw, headers, encode_chunked=True)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def write(self):
        """The status of writing a few tokens."""
        return self.ask("/write", text_of())[0]


@pytest.fixture(scope="module")
def page(saved):
    """Started as a person does."""
    pytest.importorskip("uvicorn"), pytest.importorskip("starlette")
    flags = ["--checkpoint", saved, "--port", "0", "--device", "cpu", "--dtype", "float32"]
    command = [sys.executable, ROOT / "playground.py", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            *_, last = [process.stderr.readline() for _ in range(3)]
            port = re.search(r"http://127.0.0.1:(\d+)", last)[1]
            yield Page(port=int(port), process=process)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130 and process.stderr.read() == ""  # no traceback
        finally:
            process.kill()


@pytest.mark.parametrize("prompt", ["To be", "", "两个人"])
@pytest.mark.parametrize("more", [{}, {"seed": 7, "temperature": 1.5, "top_p": 0.9}, {"stop": "e"}])
def test_the_same_seed_gives_the_text_of_generate_py(page, prompt, more):
    expected = sample_text(sharp_model(), TOKENIZER, prompt, 80, **more)
    status, stream = page.ask("/write", {"text": prompt, "max_new_tokens": 80} | more)
    events = [json.loads(line[6:]) for line in stream.decode().split("\n\n") if line]
    assert (status, prompt + events[-1]["text"]) == (200, expected)
    text = TOKENIZER.decode([i for event in events for i in event["ids"]])
    assert text.startswith(expected.removesuffix("\ufffd")) or not prompt


def test_what_the_page_is_told_is_what_the_functions_return(page):
    model, ids = sharp_model(), TOKENIZER.encode(TEXT * 2)
    read = json.loads(page.ask("/read", {"ids": ids})[1])
    assert read["ids"] == ids and read["start"] == context_start(len(ids), 32) > 0
    assert read["bits"] == pytest.approx(surprise(model, ids).tolist(), abs=1e-5)
    for place in (1, 20, 40, len(ids)):
        look = json.loads(page.ask("/look", {"ids": ids, "place": place, "top_k": 5})[1])
        columns = torch.stack(candidates(model, ids[:place], Sampling(top_k=5)))  # (3, V)
        shown = torch.tensor(look["candidates"][:10]).T
        torch.testing.assert_close(shown, columns[:, :10], rtol=0, atol=1e-6)
        rank, end = look["rank"], min(place + 1, len(ids))
        assert rank is None if place == len(ids) else columns[0, rank] == ids[place]
        assert look["kept"] == 5 and look["start"] == context_start(end, 32)
        weights = attention(model, ids[look["start"] : end])[:, :, -1].flatten()
        sent = torch.frombuffer(bytearray(base64.b64decode(look["attention"])), dtype=torch.float32)
        torch.testing.assert_close(sent, weights)
        lens = logit_lens(model, ids[context_start(place, 32) : place])[:, -6:]
        assert torch.equal(torch.tensor(look["said"]), lens.argmax(-1))
        torch.testing.assert_close(torch.tensor(look["chance"]), lens.softmax(-1).amax(-1))


def text_of(**more):
    return {"text": "To be", "max_new_tokens": 3} | more


MARKUP = text_of(text="<script>alert(1)</script><img src=x onerror=alert(1)>")
EVIL = "http://evil.example"
HOSTS = ("", "evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1")
ORIGINS = (EVIL, "null", "https://127.0.0.1", "http://127.0.0.1:1", "http://localhost", "file://")
BODIES = [b"", b"{", b"[]", b"null", b'"text"', b"NaN", b"\xff\xfe{}", b"\0" * 9, b"[" * 100_000]
BODIES += [b'{"place": ' + b"9" * 5000 + b"}", b'{"text": "\\ud800"}', b'{"text": 1}']
BODIES += [b'{"text": "x", "other": 1}', b'{"ids": "x"}', text_of(text="\x01" * 40_000)]
WRONG = {"temperature": (-1, math.nan, math.inf, "1", None), "top_k": (0, -5, 1.5), "stop": ("",)}
WRONG |= {"top_p": (0, 1.5, math.nan), "max_new_tokens": (-1, 10**9), "seed": (-1, True)}
WRONG |= {"ids": ([-1], [10**6], [10**30], [1.5], [True], [[1]], [1] * 3000), "place": (-1,)}
BODIES += [text_of(**{name: value}) for name, values in WRONG.items() for value in values]
FINE = (MARKUP, text_of(text="\0\x1b[31m\r\n\u202e"), text_of(text="<|endoftext|>"))
HOSTILE = [  # the status, and what is asked
    *((400, "/facts", None, "GET", {"Host": host}) for host in HOSTS),
    (400, "/read", text_of(), "POST", {"Host": "evil.example"}),
    *((403, "/write", text_of(), "POST", {"Origin": origin}) for origin in ORIGINS),
    *((403, path, text_of(), "POST", {"Origin": EVIL}) for path in ("/read", "/look")),
    *((400, "/write", body, "POST", {}) for body in BODIES),
    *((404, path, None, "GET", {}) for path in ("/../config.py", "//etc/passwd", "/config.py")),
    *((405, "/read", text_of(), method, {}) for method in ("GET", "PUT", "EVIL")),
    *((200, "/read", body, "POST", {}) for body in FINE),
    (200, "/look", text_of(place=10**30), "POST", {}),
    (200, "/write", {"max_new_tokens": 2}, "POST", {}),
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_what_a_stranger_sends_is_answered_or_refused_in_a_line(page, number):
    expected, path, body, method, headers = HOSTILE[number]
    status, said = page.ask(path, body, method, **headers)
    assert status == expected
    is_line = len(said) < 300 and b"\n" not in said.strip() and b"Traceback" not in said
    assert is_line or status < 400
    if body is MARKUP:
        assert TOKENIZER.decode(json.loads(said)["ids"]) == MARKUP["text"]


def test_what_is_too_large_is_cut_off(page):
    parts = (b" " * 10_000 for _ in range(100))  # of a body without a length
    for status, path, body, headers in (
        (413, "/write", b" " * 30_000_000, {}),
        (413, "/read", parts, {"Transfer-Encoding": "chunked"}),
        (400, "/facts", None, {"X": "x" * 200_000}),
        (400, "/" + "x" * 200_000, None, {}),
    ):
        with contextlib.suppress(ConnectionError):  # it may hang up
            assert page.ask(path, body, **headers)[0] == status
        assert page.write() == 200


def test_crowds_and_readers_who_leave_cost_no_memory(page):
    def at_once(count):
        with ThreadPoolExecutor(count) as crowd:
            return {*crowd.map(lambda _: page.write(), range(count))}

    busy, memory, body = set(), [], json.dumps(text_of(max_new_tokens=2048))
    head = f"POST /write HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    for _ in range(8):
        assert at_once(20) == {200}
        busy |= at_once(100)
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", page.port)) as client:
            client.sendall((head + body).encode())
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
        assert page.write() == 200  # at once, and not after 2,048 tokens
        assert time.monotonic() - began < 10
        status = Path(f"/proc/{page.process.pid}/status").read_text()
        memory.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1000)
    assert busy == {200, 503} and memory[7] < memory[3] + 10


def test_what_is_wrong_is_one_line(page, monkeypatch, capsys):
    assert run(playground.main, ["--port", str(page.port)]) == 2
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run(playground.main, []) == 2
    taken, missing = capsys.readouterr().err.splitlines()
    assert f"--port {page.port}: " in taken and "try --port 0" in taken
    assert "pip install -r requirements-web.txt" in missing


@pytest.fixture(scope="module")
def browser():
    """Chromium, in English."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver (apt-get install chromium chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    flags = "headless=new no-sandbox no-first-run disable-gpu no-proxy-server lang=en"
    for flag in (*flags.split(), "disable-background-networking", "window-size=1280,900"):
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options, service) as driver:
        driver.implicitly_wait(10)
        yield driver


@pytest.fixture
def reader(browser, page):
    """A person with a freshly loaded page, whose console must stay empty."""
    browser.get(f"http://127.0.0.1:{page.port}/")
    reader = Reader(browser=browser, find=lambda css: browser.find_element("css selector", css))
    reader.until(lambda: reader.all("#settings label"))
    yield reader
    assert browser.get_log("browser") == []


class Reader(SimpleNamespace):
    def js(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def until(self, condition):
        for _ in range(300):
            if found := condition():
                return found
            time.sleep(0.05)
        raise AssertionError(f"never came: {self.js('return document.body.innerText')}")

    def all(self, selector):
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
        return self.js(script, selector)

    def text(self):
        return self.find("#text").get_property("value")

    def type(self, text):
        self.find("#text").click()
        self.browser.execute_cdp_cmd("Input.insertText", {"text": text})
        self.until(lambda: "tokens" in self.find("#status").text)

    def set(self, name, value):
        self.find(f"#set-{name}").clear()
        self.find(f"#set-{name}").send_keys(str(value))

    def has_written(self):
        """Whether the text has been written and read, and the page awaits what comes next."""
        return "next?" in self.find("#which").text and "a second" in self.find("#status").text

    def choose(self, offset):
        """Put the cursor before a character, as the arrow keys would, and wait for the panel."""
        self.js("document.querySelector('#panel').ariaBusy = 'true'")
        self.js("text.focus(); text.setSelectionRange(...arguments)", offset, offset)
        self.until(lambda: self.all("#mirror .chosen") and self.all("#panel[aria-busy=false] *"))

    def show(self, tab):
        self.find(f"#tab-{tab}").click()
        return self.until(lambda: self.all("#panel *"))


def percents(chances):
    return [f"{100 * p:.2f} %" if p >= 0.0001 or p == 0 else "< 0.01 %" for p in chances]


def test_a_reader_writes_looks_inside_and_takes_a_branch(reader):
    model, prompt = sharp_model(), "To be, 却😀"
    reader.type(prompt)
    reader.set("max_new_tokens", 40)
    reader.set("top_k", 7)
    reader.find("#write").click()
    reader.until(reader.has_written)
    long = reader.text()
    assert long == sample_text(model, TOKENIZER, prompt, 40, top_k=7)
    assert "".join(reader.all("#mirror span")).rstrip("\u200b") == long
    ids, place = TOKENIZER.encode(prompt), len(TOKENIZER.encode("To be,"))
    reader.choose(len("To be,"))
    assert f"token {place + 1} of" in reader.find("#which").text
    order, *chances = candidates(model, ids[:place], Sampling(top_k=7))
    expected = percents(torch.stack(chances, dim=1)[:10].flatten())
    assert reader.all("#panel .chance")[:20] == expected
    assert reader.all("tr.drawn button") and "7 can be drawn" in reader.find("#panel").text
    reader.show("attention")
    for name, value in {"layer": 1, "head": 0}.items():
        reader.js(f"const s = document.querySelector('#{name}'); s.value = {value}; s.onchange()")
    weights = attention(model, ids[: place + 1])[1, 0, -1].sort(descending=True).values
    assert [cell for cell in reader.all("#panel td") if "%" in cell] == percents(weights[:6])
    reader.show("layers")
    said = logit_lens(model, ids[:place])[:, -6:].argmax(-1)
    assert len(reader.all("#lens tr")) == 1 + len(said)
    assert len(reader.all("#lens td")) == said.numel()
    assert "parameters" in reader.show("model")[0]
    reader.show("token")
    reader.find("#panel tr:nth-child(3) button").click()
    reader.until(lambda: reader.text() != long)
    assert reader.text() == TOKENIZER.decode([*ids[:place], order[1].item()])
    reader.find("#undo").click()
    reader.until(lambda: reader.text() == long)


def test_a_character_of_several_tokens_is_one_piece_whose_parts_can_be_chosen(reader):
    text = "龍 <b>x</b><img src=x>"  # not in the tokenizer's text: three bytes
    reader.type(text)
    assert reader.all("#mirror span")[0] == "龍" and not reader.all("#mirror :is(b, img)")
    assert "".join(reader.all("#mirror span")).rstrip("\u200b") == text
    reader.choose(0)
    assert reader.find("#which").text.startswith("\\xe9 part of 龍")
    reader.find("#next").click()
    reader.until(lambda: "token 2 of" in reader.find("#which").text)
    assert reader.all("#mirror .chosen") == ["龍"]


def test_the_keyboard_is_enough_a_long_text_stops_and_what_is_not_seen_is_grey(reader):
    control, enter, escape, right = "\ue009", "\ue007", "\ue00c", "\ue014"  # WebDriver's names
    reader.set("max_new_tokens", 2048)
    reader.type("To be")
    reader.find("#text").send_keys(control, enter)
    reader.until(lambda: len(reader.text()) > 50)
    reader.find("#text").send_keys(escape)
    reader.until(reader.has_written)
    written = int(re.search(r"^([\d,]+) tokens", reader.find("#status").text)[1])
    assert 0 < written < 2048 and reader.all("#mirror .unseen")
    kept = reader.text()
    reader.set("max_new_tokens", 5)
    reader.find("#text").send_keys(control, enter)  # goes on from there
    reader.until(lambda: reader.text() != kept and reader.has_written())
    assert reader.text().startswith(kept.rstrip("\ufffd"))
    reader.find("#tab-token").click()
    reader.browser.switch_to.active_element.send_keys(right)
    assert reader.browser.switch_to.active_element.get_attribute("id") == "tab-attention"


@pytest.mark.parametrize("width", [1280, 400])
def test_it_can_be_read_in_both_languages_at_any_width(reader, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    reader.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    reader.type("To be, or not")
    reader.choose(4)
    for tab in ("token", "attention", "layers", "model"):
        reader.show(tab)
        assert reader.js("return document.documentElement.scrollWidth") <= width, tab
    assert "Write" in reader.find("body").text
    reader.find("#language").click()
    assert "续写" in reader.find("body").text
    assert not re.search("Write|Undo|surprised|Attention", reader.find("body").text)
    assert reader.find("html").get_attribute("lang") == "zh"
