"""Model and prompt in, text out.

    python generate.py --prompt "To be"
    python generate.py --interactive
    python generate.py --prompt "To be" --temperature 0.7 --num_samples 3
    python generate.py --prompts_file prompts.txt --output samples.txt --seed 7
    python generate.py --checkpoint gpt2-xl --prompt "In a shocking finding"

From Python: `from generate import batch_generate; batch_generate(prompts, "samples.txt")`.
"""

import contextlib
import os
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

from checkpoint import ModelOptions, load_model, log_next_generate
from files import atomic_write, read_text, unix_lines
from logger import log, log_row, run, show
from options import describe_fields, parse_args, validate
from quantize import pack_linears
from sampling import Sampling, generate_texts
from sampling import sample_text as sample_text  # for notebooks: from generate import sample_text
from utils import out_of_memory, peak_mb

SEPARATOR = "---\n"  # between several texts
BATCH_SIZE = 16  # texts at a time


@dataclass
class Options(Sampling, ModelOptions):
    # what to continue, and where the text goes
    prompt: str = ""  # text to continue
    interactive: bool = False  # continue what is typed
    prompts_file: str | None = None  # one prompt per line, blank lines skipped
    output: str | None = None  # write the texts here, not to stdout
    stats: bool = False  # say how fast it was, and how much memory it took

    def conflicts(self):
        sources = [n for n in ("prompt", "interactive", "prompts_file") if getattr(self, n)]
        if len(sources) > 1:
            yield f"--{sources[1]}: not allowed with --{sources[0]}"
        if self.interactive and self.output is not None:
            yield "--output: not allowed with --interactive"


def main(argv=None) -> int:
    usage = "generate.py --prompt TEXT | --interactive | --prompts_file FILE [flags]"
    options = parse_args(Options, argv, __doc__, usage)
    for stream in (sys.stdin, sys.stdout):  # regardless of the locale
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    prompts, path = [options.prompt], options.prompts_file
    if path is not None:
        prompts = [line for line in unix_lines(read_text(path)).split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts_file {path}: holds no prompt; it needs one per line")
    with out_of_memory("fewer --num_samples or prompts, or --dtype bfloat16, need less"):
        model, tokenizer = load_model(options.checkpoint, options.device, options.dtype)
        pack_linears(model, min(len(prompts) * options.num_samples, BATCH_SIZE))
        log_row("sampling", describe(options))
        if options.interactive:
            interact(model, tokenizer, options)
        else:
            show_texts(model, tokenizer, prompts, options)
            log_next_generate(options.checkpoint, options.device, options.dtype)
    return 0


def describe(sampling) -> str:
    """The settings in force, on one line; those that are off by default only if changed."""
    pairs = [(f, getattr(sampling, f.name)) for f in fields(Sampling)]
    on = [(f.name, value) for f, value in pairs if value != f.default or value not in (None, 1)]
    return ", ".join(f"{name} {value!r}" for name, value in on)


def show_texts(model, tokenizer, prompts, options):
    """Write the texts to --output, or print them: a text alone in its batch as it is generated."""
    start, times = time.perf_counter(), []
    texts = generate_texts(model, tokenizer, prompts, options, BATCH_SIZE, times)
    if options.output is not None:
        write_texts(options.output, texts)
    else:
        for number, pieces in enumerate(texts):
            show(SEPARATOR if number else "")
            for place, piece in enumerate(pieces):
                show(piece, "" if place else "bold")
            show("\n")
    if options.stats and times:
        seconds, memory = times[-1] - start, peak_mb(next(model.parameters()).device) or 0
        speed = f"{len(times):,} tokens in {seconds:.2f} s, {len(times) / seconds:,.1f} a second"
        log_row("stats", f"{speed}; the first after {times[0] - start:.3f} s; {memory:,.0f} MB")


def batch_generate(
    prompts, output_file=None, checkpoint=None, batch_size=16, device=None, dtype=None, **settings
) -> list[str]:
    """Continue many prompts, batch_size at a time; write the texts to output_file if given.

    settings: fields of Sampling. Returns each prompt with its continuation, num_samples times, as
    if generated alone. Raises ValueError for settings out of range, CheckpointError, WriteError.
    """
    sampling = validate(Sampling(**settings))
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    model, tokenizer = load_model(checkpoint, device, dtype)
    pack_linears(model, min(batch_size, len(prompts) * sampling.num_samples))
    texts = generate_texts(model, tokenizer, prompts, sampling, batch_size)
    return [*map("".join, texts)] if output_file is None else write_texts(output_file, texts)


def write_texts(path, texts) -> list[str]:
    """Write texts, each in pieces, to path as they arrive, atomically; return them."""
    path, written = Path(os.path.realpath(path)), []  # a link stays a link
    if path.exists() and not path.is_file():
        raise ValueError(f"--output {path}: not a regular file")
    with atomic_write(path) as file:
        for text in map("".join, texts):
            file.write(f"{SEPARATOR if written else ''}{text}\n".encode(errors="replace"))
            written.append(text)
    log_row("wrote", f"{len(written)} text{'' if len(written) == 1 else 's'} to {path}", "green")
    return written


# ---------------------------------------------------------------- interactive

HELP = """\
Every line is continued on its own, with the next seed: --seed, --seed + 1 ...
A line that ends in \\ goes on in the next one. Ctrl-C ends a text.
/again            continue the last line once more, with the next seed
/quit             leave, as the end of input (Ctrl-D) does
/set NAME VALUE   change a setting:"""


def interact(model, tokenizer, sampling):
    """Continue each line of stdin by itself, with the next seed; Ctrl-C ends a text, or quits."""
    log_row("how", "type a line, the model continues it; /help for more, Ctrl-D leaves")
    with contextlib.suppress(ImportError):  # not available on Windows
        import readline  # noqa: F401  (input() then edits the line and knows the earlier ones)
    prompt = ""
    while (line := read_line("\n> ")) is not None and line.strip() != "/quit":
        while line.endswith("\\"):
            line = f"{line[:-1]}\n{read_line('. ') or ''}"
        try:
            if line.startswith("/") and line.strip() != "/again":
                command(line, sampling)
                continue
            prompt = prompt if line.strip() == "/again" else line
            this, sampling = sampling, replace(sampling, seed=sampling.seed + 1)
            show_texts(model, tokenizer, [prompt], this)
        except ValueError as error:
            log(f"error: {error}")
        except KeyboardInterrupt:
            show("\n")


def read_line(ask) -> str | None:
    """The next line of input, None at its end. A person is asked for it."""
    person = sys.stdin and sys.stdin.isatty() and sys.stdout.isatty()
    try:
        return input(ask if person else "")
    except (EOFError, RuntimeError):  # RuntimeError: stdin was closed by the caller
        if person:
            log()  # so that the shell's prompt starts a new line
        return None


def command(line: str, sampling: Sampling):
    """Run a /command, which may change a setting."""
    word, name, text = [*line.strip().split(maxsplit=2), "", ""][:3]
    notes = describe_fields(Sampling)
    if word == "/set" and name in notes:
        setattr(sampling, name, getattr(validate(replace(sampling, **{name: text})), name))
        log_row("sampling", describe(sampling))
    elif word == "/help":
        rows = [f"{name:<15} {getattr(sampling, name)!r:<6} {notes[name][1]}" for name in notes]
        log("\n".join([HELP, *rows]))
    else:
        raise ValueError(f"{word} {name}: no such command or setting; /help lists them")


if __name__ == "__main__":
    sys.exit(run(main))
