"""Model and prompt in, text out.

    python generate.py --prompt "To be"
    python generate.py --interactive
    python generate.py --prompt "To be" --temperature 0.7 --num_samples 3
    python generate.py --prompts_file prompts.txt --output samples.txt --seed 7
    python generate.py --checkpoint gpt2-xl --prompt "In a shocking finding"

From Python: `from generate import batch_generate; batch_generate(prompts, "samples.txt")`.
Shapes: B rows (a prompt or one of its samples each), T time, V vocabulary, K candidates.
"""

import contextlib
import math
import os
import sys
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn

from config import dtype_name
from convert import add_model_flags, load_model, say_next
from model import KVCache, context_limit, context_start
from tokenizer import StreamDecoder
from utils import (
    ArgumentParser,
    derived_seed,
    laid_out,
    log,
    log_row,
    run,
    styled,
    warn,
    world_size,
    writing,
)

SEPARATOR = "---\n"  # between texts, where there are several
CONTROLS = {*range(32), *range(127, 160)} - {ord("\n"), ord("\t")}
ESCAPES = {code: f"\\x{code:02x}" for code in CONTROLS}


@dataclass
class Sampling:
    """How text is drawn; every field is a flag and can be /set."""

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = 200
    top_p: float | None = None
    stop: str | None = None
    num_samples: int = 1
    seed: int = 1337


MEANINGS = {
    "max_new_tokens": "tokens to add to the prompt",
    "temperature": "below 1 safer, above 1 wilder, 0 always the most likely token",
    "top_k": "choose among so many most likely tokens",
    "top_p": "choose among the most likely tokens that together have this probability",
    "stop": "end before this text",
    "num_samples": "texts a prompt",
    "seed": "the same seed gives the same text",
}
LIMITS = {  # setting: type, check, and the check in words
    "max_new_tokens": (int, lambda v: v >= 0, "a whole number, 0 or more"),
    "temperature": (float, lambda v: 0 <= v < math.inf, "a number, 0 or more"),
    "top_k": (int, lambda v: v >= 1, "a whole number, 1 or more, or none"),
    "top_p": (float, lambda v: 0 < v <= 1, "a number in (0, 1], or none"),
    "stop": (str, lambda v: v != "", "some text, or none"),
    "num_samples": (int, lambda v: v >= 1, "a whole number, 1 or more"),
    "seed": (int, lambda v: v >= 0, "a whole number, 0 or more"),
}
OPTIONAL = ("top_k", "top_p", "stop")  # None: off


def problems(settings: dict) -> list[str]:
    """A line for each setting that is out of range."""
    return [
        f"--{name} {value}: must be {LIMITS[name][2]}"
        for name, value in settings.items()
        if not (value is None and name in OPTIONAL) and not LIMITS[name][1](value)
    ]


def parse_settings(texts: dict[str, str]) -> tuple[dict, list[str]]:
    """Values from the texts of flags or of /set, and a line for each that is not allowed."""
    values, found = {}, []
    for name, text in texts.items():
        kind, _, limit = LIMITS[name]
        try:
            off = name in OPTIONAL and text.lower() == "none"
            values[name] = None if off else kind(text)
        except ValueError:
            found.append(f"--{name} {text}: must be {limit}")
    return values, found + problems(values)


def describe(sampling: Sampling) -> str:
    """The settings in force, on one line; some are named only where they were changed."""
    usual = {"top_p": None, "stop": None, "num_samples": 1}
    settings = vars(sampling).items()
    shown = [f"{name} {_shown(v)}" for name, v in settings if name not in usual or v != usual[name]]
    return ", ".join(shown)


def explain(sampling: Sampling) -> str:
    """Every setting with its value and its meaning, a line each."""
    settings = vars(sampling).items()
    lines = [laid_out(MEANINGS[name], f"{name:<15} {_shown(v):<6} ") for name, v in settings]
    return "\n".join(lines)


def _shown(value):
    if value is None:
        return "none"
    return repr(value) if isinstance(value, str) else str(value)


# ---------------------------------------------------------------- choosing a token


def sample(logits, uniform, temperature=1.0, top_k=None, top_p=None):
    """Token ids (B,) from logits (B, V) and one number in [0, 1) a row (B,)."""
    if temperature < 1e-6:  # 0, or so near it that float32 could not tell
        return logits.argmax(dim=-1)
    values, ids = most_likely(logits, top_k)  # (B, K), (B, K)
    chosen = draw(probabilities(values, temperature, top_p), uniform)  # (B,)
    return ids.gather(1, chosen[:, None])[:, 0]  # (B,)


def most_likely(logits, top_k=None):
    """The largest top_k logits of each row, descending, and their ids: (B, K) and (B, K)."""
    if top_k is None or top_k >= logits.shape[-1]:
        return logits.sort(dim=-1, descending=True, stable=True)
    return logits.topk(top_k, dim=-1)


def probabilities(values, temperature=1.0, top_p=None):
    """Probabilities (B, K) from descending logits (B, K).

    top_p keeps the smallest set of most likely tokens whose probability reaches it (nucleus
    sampling, Holtzman et al. 2020); what is left out gets 0, and the rest is not scaled up again.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    values = values - values[:, :1]  # the largest is 0, so that no temperature overflows
    p = torch.softmax(values / temperature, dim=-1)  # (B, K)
    if top_p is not None and top_p < 1:  # for 1 rounding would leave out the last ones
        before = p.cumsum(dim=-1) - p  # probability of all that is more likely
        p = torch.where(before < top_p, p, 0)
    return p


def draw(p, uniform):
    """The column (B,) at which the running sum of p (B, K) passes uniform (B,) of its total.

    One number decides, and the most likely come first: where none tie, CPU and GPU choose alike.
    """
    passed = p.cumsum(dim=-1)  # (B, K)
    target = uniform[:, None].to(p.dtype) * passed[:, -1:]  # (B, 1)
    return ((passed[:, :-1] <= target) & (p[:, 1:] > 0)).sum(dim=-1)


def uniform_numbers(seed, samples, device):
    """Endlessly, a number in [0, 1) for each row: (B,).

    They follow from the seed and the sample's number, not from the row in the batch, so that a
    prompt gets the same text in any company, on any device.
    """
    generators = [torch.Generator().manual_seed(derived_seed(seed, n)) for n in samples]
    while True:
        block = torch.stack([torch.rand(256, generator=g) for g in generators], dim=1)  # (256, B)
        yield from block.to(device)


# ---------------------------------------------------------------- tokens


@torch.inference_mode()
def generate_ids(model, prompts, sampling, samples=None, eot_id=None, use_cache=True):
    """Yield, token by token, each row's new id; None once the row has met eot_id.

    prompts: B lists of ids, none empty, of any lengths; samples: the number of each row's sample.
    Ends after max_new_tokens, or when every row has ended. With or without the cache the text is
    the same, also where it outgrows block_size (context_start says what the model then sees).
    """
    tokens = [list(prompt) for prompt in prompts]
    device = next(model.parameters()).device
    uniform = uniform_numbers(sampling.seed, samples or [0] * len(tokens), device)
    cache = new_cache(model, len(tokens)) if use_cache else None
    ended, new, next_logits = [False] * len(tokens), None, None
    for step in range(sampling.max_new_tokens):
        if cache is None or step == 0:
            logits = window_logits(model, tokens, cache)  # (B, V)
        else:
            next_logits = next_logits or decoder(model, cache)
            logits = next_logits(new)  # (B, V)
        if step == 0 and not logits.isfinite().all():
            name = dtype_name(logits.dtype)
            warn(f"the model's logits are not finite in {name}; try --dtype bfloat16 or float32")
        new = sample(logits, next(uniform), sampling.temperature, sampling.top_k, sampling.top_p)
        ids = new.tolist()
        for row, token in enumerate(ids):
            tokens[row].append(token)
            ended[row] = ended[row] or token == eot_id
        yield [None if over else token for token, over in zip(ids, ended, strict=True)]
        if all(ended):
            return


def decoder(model, cache):
    """A function from the newest tokens (B,), which the cache takes up, to logits (B, V)."""
    device, rows = cache.idx.device, len(cache.lengths)
    packed = pack_linears(model, rows) if device.type == "cpu" else {}

    def decode(new):
        with fast_linears(packed, rows, device):
            return model(new[:, None], cache=cache)[0][:, -1]

    if device.type != "cuda" or torch.is_autocast_enabled("cuda") or world_size() > 1:
        return decode
    return GraphedDecoder(decode, cache)


class GraphedDecoder:
    """A decoding step as one CUDA graph: the GPU starts its hundreds of small kernels by itself,
    instead of waiting for Python before each. Where a row is full, the plain step slides it.
    """

    def __init__(self, decode, cache):
        self.decode, self.cache = decode, cache
        self.graph, self.room = None, cache.block_size

    def __call__(self, new):
        if not self.cache.has_room(1) or max(self.cache.lengths) + 1 > self.room:
            return self.decode(new)
        if self.graph is None:
            self._record(new)
        self.new.copy_(new)
        self.graph.replay()
        self.cache.lengths = [length + 1 for length in self.cache.lengths]
        return self.logits

    def _record(self, new):
        """Record the step, after two runs that set libraries up; what they wrote is overwritten."""
        self.cache.hold_still()
        self.new, lengths = new.clone(), list(self.cache.lengths)
        with torch.cuda.device(new.device):  # streams and graphs are made on the current one
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):
                    self.decode(self.new)
                    self.cache.truncate(lengths)
            torch.cuda.current_stream().wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=aside):  # its own may be on another device
                self.logits = self.decode(self.new)
        self.cache.truncate(lengths)


PACKED = weakref.WeakKeyDictionary()  # model: what its packed weights were made from, and they


def pack_linears(model, rows) -> dict:
    """For each linear layer of a bf16 model on a CPU a function with its weights in the order in
    which oneDNN multiplies them fastest with so many rows: half the time for eight. Costs the
    weights' memory again, for as long as the model lives and keeps its weights. Empty where there
    is no oneDNN for bf16.
    """
    weight = next(model.parameters())
    if weight.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return {}
    oneDNN = torch.ops.mkldnn
    if not oneDNN._is_mkldnn_bf16_supported():
        return {}

    layers = [layer for layer in model.modules() if type(layer) is nn.Linear]
    if layers[0].weight.is_inference():  # whether it changes cannot be seen
        return {layer: _packed(oneDNN, layer, rows) for layer in layers}
    made_from = rows, [(layer.weight.data_ptr(), layer.weight._version) for layer in layers]
    if PACKED.get(model, (None,))[0] != made_from:
        PACKED[model] = made_from, {layer: _packed(oneDNN, layer, rows) for layer in layers}
    return PACKED[model][1]


def _packed(oneDNN, layer, rows):
    weight, bias = oneDNN._reorder_linear_weight(layer.weight, rows), layer.bias
    return lambda x: oneDNN._linear_pointwise(x, weight, bias, "none", [], "")


@contextlib.contextmanager
def fast_linears(packed, rows, device):
    """Linear layers as they are fastest on a CPU: packed, or for a single row without oneDNN, which
    would arrange the weights anew for each product.
    """
    was_enabled = torch.backends.mkldnn.enabled
    try:
        for layer, multiply in packed.items():
            layer.__dict__["forward"] = multiply
        if not packed and rows == 1 and device.type == "cpu":
            torch.backends.mkldnn.enabled = False
        yield
    finally:
        torch.backends.mkldnn.enabled = was_enabled
        for layer in packed:  # Ctrl-C may have come before all were set
            layer.__dict__.pop("forward", None)


def new_cache(model, rows):
    """A cache in the type that attention computes in: the model's, on a CPU at least float32."""
    weight = next(model.parameters())
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    if kind == "cpu" and dtype == torch.bfloat16:
        dtype = torch.float32
    return KVCache(model.config, rows, weight.device, dtype)


def window_logits(model, tokens, cache=None):
    """Logits (B, V) for the token after each row, from as much of the row as the model sees.

    Shorter rows are padded on the right, where no earlier token looks; an empty cache is filled.
    """
    limit = context_limit(model.config)
    windows = [row[context_start(len(row), limit) :] for row in tokens]
    lengths = [len(window) for window in windows]
    padded = [window + [0] * (max(lengths) - len(window)) for window in windows]
    device = next(model.parameters()).device
    idx, ends = torch.tensor(padded, device=device), torch.tensor(lengths, device=device)  # (B, T)
    logits, _ = model(idx, cache=cache, at=ends - 1)  # (B, 1, V)
    if cache is not None:
        cache.truncate(lengths)
    return logits[:, 0]


# ---------------------------------------------------------------- text


class TextRow:
    """One row's text as its tokens come in, ended before the stop text."""

    def __init__(self, tokenizer, stop=None):
        self.decoder, self.stop = StreamDecoder(tokenizer), stop
        self.held = ""  # may be the beginning of the stop text
        self.done = False

    def push(self, token: int | None) -> str:
        """The text that is certain after one more token; None is the row's end."""
        if token is None:
            return self.finish()
        return "" if self.done else self._release(self.decoder.push(token))

    def finish(self) -> str:
        """The rest: nothing follows that could make it the stop text."""
        if self.done:
            return ""
        text = self._release(self.decoder.flush()) + self.held
        self.held, self.done = "", True
        return text

    def _release(self, new):
        text, stop = self.held + new, self.stop or ""
        if stop and stop in text:
            self.held, self.done = "", True
            return text[: text.index(stop)]
        longest = min(len(text), len(stop) - 1)
        hold = next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
        self.held = text[len(text) - hold :]
        return text[: len(text) - hold]


def stream_text(model, tokenizer, prompts, sampling, samples=None):
    """Yield, token by token, the new text of each prompt; all joined, it is the continuation."""
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    limit = context_limit(model.config)
    for length in sorted({len(row) for row in ids if context_start(len(row), limit)}):
        seen = length - context_start(length, limit)
        warn(f"a prompt of {length} tokens is cropped to its last {seen} (block_size {limit})")
    rows = [TextRow(tokenizer, sampling.stop) for _ in prompts]
    for new in generate_ids(model, ids, sampling, samples, tokenizer.eot_id):
        yield [row.push(token) for row, token in zip(rows, new, strict=True)]
        if all(row.done for row in rows):
            return
    yield [row.finish() for row in rows]


def prompt_ids(tokenizer, prompt) -> list[int]:
    """The prompt's ids; for an empty one a token after which a text may begin, never printed."""
    ids = tokenizer.encode(prompt)
    if not ids and tokenizer.eot_id is not None:
        ids = [tokenizer.eot_id]
    if not ids:
        with contextlib.suppress(ValueError):  # a vocabulary of characters may lack the newline
            ids = tokenizer.encode("\n")
    return ids or [0]


def check_prompts(tokenizer, prompts):
    """ValueError with a line for each prompt that cannot be encoded, before any work is done."""
    found = []
    for number, prompt in enumerate(prompts, 1):
        try:
            tokenizer.encode(prompt)
        except ValueError as error:
            found.append(f"prompt {number}: {error}")
    if found:
        raise ValueError("\n".join(found))


def generate_texts(model, tokenizer, prompts, sampling, batch_size=16):
    """Yield each prompt with its continuation, num_samples times, in the order of the prompts."""
    check_prompts(tokenizer, prompts)
    work = [(prompt, sample) for prompt in prompts for sample in range(sampling.num_samples)]
    for start in range(0, len(work), batch_size):
        some, samples = zip(*work[start : start + batch_size], strict=True)
        pieces = stream_text(model, tokenizer, some, sampling, samples)
        yield from ("".join(parts) for parts in zip(some, *pieces, strict=True))


def sample_text(model, tokenizer, prompt, max_new_tokens=200, **settings) -> str:
    """The prompt and its continuation; leaves the model's mode and all random states alone.

    settings: fields of Sampling.
    """
    sampling = Sampling(max_new_tokens, **settings)
    was_training = model.training
    model.eval()
    try:
        return next(generate_texts(model, tokenizer, [prompt], sampling))
    finally:
        model.train(was_training)


def batch_generate(
    prompts,
    output_file=None,
    checkpoint=None,
    *,
    batch_size=16,
    device=None,
    dtype=None,
    **settings,
) -> list[str]:
    """Continue many prompts, batch_size at a time; write the texts to output_file if it is given.

    settings: fields of Sampling (max_new_tokens, temperature, top_k ...). Returns the texts, prompt
    and continuation, num_samples a prompt, in the order of the prompts: each the text that its
    prompt would get alone. Raises ValueError for settings out of range, CheckpointError where there
    is no usable checkpoint, OSError with exit_code 4 where the file cannot be written.
    """
    sampling = Sampling(**settings)
    if found := problems(vars(sampling)):
        raise ValueError("\n".join(found))
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    model, tokenizer = load_model(checkpoint, device, dtype)
    texts = generate_texts(model, tokenizer, prompts, sampling, batch_size)
    return list(texts) if output_file is None else write_texts(output_file, texts)


def write_texts(path, texts) -> list[str]:
    """Write texts to path as they come, aside, and rename at the end; return them."""
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.exists() and not path.is_file():
        raise ValueError(f"--output {path}: there is something else than a file")
    aside, written = path.with_name(f".{path.name}.tmp"), []
    try:
        with writing():
            with open(aside, "w", encoding="utf-8", errors="replace", newline="\n") as file:
                for text in texts:
                    file.write(f"{SEPARATOR if written else ''}{text}\n")
                    written.append(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
    log_row("wrote", f"{len(written)} texts to {path}", "green")
    return written


# ---------------------------------------------------------------- the terminal


def show(text: str, style: str | None = None):
    """Text on stdout at once; what would steer a terminal is shown as \\x1b instead."""
    text = text.translate(ESCAPES) if sys.stdout.isatty() else text
    print(styled(text, style, sys.stdout) if style else text, end="", flush=True)


def show_texts(model, tokenizer, prompts, sampling):
    """A single text as it comes, several one after the other."""
    samples = sampling.num_samples
    if len(prompts) * samples > 1:
        for number, text in enumerate(generate_texts(model, tokenizer, prompts, sampling)):
            prompt = prompts[number // samples]
            show(SEPARATOR if number else "")
            show(prompt, "bold")
            show(f"{text[len(prompt) :]}\n")
        return
    for number, [piece] in enumerate(stream_text(model, tokenizer, prompts, sampling)):
        if number == 0:
            show(prompts[0], "bold")
        show(piece)
    show("\n")


HELP = """\
Every line is continued by the model, on its own: nothing of earlier lines is
remembered. Each takes the next seed (--seed, --seed + 1, ...), so that the
same line twice gives two texts. Ctrl-C ends a text.
/set NAME VALUE   change a setting, for example: /set temperature 0.7
/show             the settings and what they mean
/quit             leave, as the end of input (Ctrl-D) does"""
WELCOME = "type a line, the model continues it; /help for more, Ctrl-D leaves"


def interact(model, tokenizer, sampling) -> int:
    """Continue every line of stdin until its end; Ctrl-C ends a text, between texts it leaves."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (input() then edits the line and knows the earlier ones)
    while (line := read_line()) is not None and line.strip() != "/quit":
        try:
            if line.startswith("/"):
                sampling = command(line, sampling)
            else:
                this, sampling = sampling, replace(sampling, seed=sampling.seed + 1)
                show_texts(model, tokenizer, [line], this)
        except ValueError as error:
            print(laid_out(str(error), "error: ", "red"), file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            show("\n")
    return 0


def read_line() -> str | None:
    """The next line of input, None at its end. A prompt is shown to a person only."""
    if sys.stdin is None:  # closed by who started this
        return None
    person = sys.stdin.isatty()
    if person:
        log()
    if person and not sys.stdout.isatty():  # input() would write its prompt among the results
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        return input("> " if person and sys.stdout.isatty() else "")
    except EOFError:
        if person:
            log()  # the shell's prompt shall not follow ours
        return None


def command(line: str, sampling: Sampling) -> Sampling:
    """Obey a line that begins with a slash; the settings from then on."""
    word, _, rest = line.strip().partition(" ")
    if word == "/set":
        name, _, text = rest.strip().partition(" ")
        if name not in LIMITS or not text:
            raise ValueError(f"/set NAME VALUE, where NAME is one of {', '.join(LIMITS)}")
        values, found = parse_settings({name: text.strip()})
        if found:
            raise ValueError(found[0].replace("--", "/set ", 1))
        sampling = replace(sampling, **values)
        log_row("sampling", describe(sampling))
    elif word == "/help":
        log(HELP)
    elif word == "/show":
        print(explain(sampling), file=sys.stderr, flush=True)
    else:
        raise ValueError(f"{word}: no such command; /help lists them")
    return sampling


# ---------------------------------------------------------------- the command line


def main(argv=None) -> int:
    options, sampling = parse(argv)
    for stream in (sys.stdin, sys.stdout):  # whatever the system's own encoding may be
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        return answer(options, sampling)
    except torch.OutOfMemoryError as error:
        raise ValueError(OUT_OF_MEMORY) from error


def answer(options, sampling) -> int:
    """Do what the command line asks for."""
    prompts = read_prompts(options)
    model, tokenizer = load_model(options.checkpoint, options.device, options.dtype)
    log_row("sampling", describe(sampling))
    if options.interactive:
        log_row("how", WELCOME)
        return interact(model, tokenizer, sampling)
    if options.output is not None:
        write_texts(options.output, generate_texts(model, tokenizer, prompts, sampling))
        return 0
    show_texts(model, tokenizer, prompts, sampling)
    say_next(options.checkpoint, options.device, options.dtype)
    return 0


def parse(argv):
    """The options and how to sample; ValueError with a line for every problem at once."""
    parser = ArgumentParser(__doc__, prog="generate.py", usage=USAGE)
    add_model_flags(parser)
    group = parser.add_argument_group("what to continue, and where the text goes")
    what = group.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", default="", help="text to continue")
    what.add_argument("--interactive", action="store_true", help="continue what is typed")
    what.add_argument("--prompts_file", metavar="FILE", help="a prompt a line, blank ones skipped")
    group.add_argument("--output", metavar="FILE", help="write the texts here, not to stdout")
    how = parser.add_argument_group("how tokens are drawn").add_argument
    kinds = {int: "N", float: "X", str: "TEXT"}
    for name, default in vars(Sampling()).items():
        meaning = f"{MEANINGS[name]} (default: {_shown(default)})"
        how(f"--{name}", default=_shown(default), metavar=kinds[LIMITS[name][0]], help=meaning)
    options, unknown = parser.parse_known_args(argv)

    found = parser.unknown_flags(unknown) if unknown else []
    values, wrong = parse_settings({name: getattr(options, name) for name in LIMITS})
    found += wrong
    if options.interactive and options.output:
        found.append("--output: not with --interactive")
    if found:
        raise ValueError("\n".join(found))
    return options, Sampling(**values)


USAGE = "generate.py --prompt TEXT | --interactive | --prompts_file FILE [flags]"
OUT_OF_MEMORY = (
    "out of GPU memory: fewer --num_samples or prompts, --dtype bfloat16 or --device cpu need less"
)


def read_prompts(options) -> list[str]:
    """The prompts of the command line."""
    path = options.prompts_file
    if path is None:
        return [options.prompt]
    try:
        lines = Path(path).read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--prompts_file {path}: not UTF-8 (byte {error.start}); save it as UTF-8"
        ) from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts_file {path}: holds no prompt; it needs one a line")
    return prompts


if __name__ == "__main__":
    sys.exit(run(main))
