"""Megabytes of text a second while preparing GPT-2's tokens, beside nanoGPT.

python bench.py prepare --nanogpt nanoGPT --megabytes 200
"""

import functools
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench_common import HERE, InTurns, run_work, take_turns

from options import integer


@dataclass(kw_only=True)
class PrepareOptions(InTurns):
    # preparing
    megabytes: integer(1) = 200  # size of the text


def compare_preparing(options, config) -> dict:
    """Whole processes: prepare_data.py, and nanoGPT's data/shakespeare/prepare.py on that text,
    which is the bundled sonnets' words in a seeded random order.
    """
    words = np.array((HERE / "data" / "sonnets.txt").read_text("utf-8").split(" "))
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/input.txt", "w", encoding="utf-8") as file:
            while file.tell() < options.megabytes * 1e6:
                file.write(" ".join(generator.choice(words, 100_000)) + "\n")
            megabytes = file.tell() / 1e6
        ours = [f"{HERE}/prepare_data.py", "--input", file.name, "--tokenizer", "gpt2"]
        ours += ["--data_dir", f"{folder}/ours", "--overwrite"]
        contenders = {"ours": functools.partial(time_script, ours, megabytes)}
        if options.nanogpt:  # it reads the input.txt next to it
            script = shutil.copy(Path(options.nanogpt) / "data/shakespeare/prepare.py", folder)
            contenders["nanoGPT"] = functools.partial(time_script, [script], megabytes)
        return {"unit": "MB", "results": take_turns(contenders, options)}


# a process that forks has its own memory counted in its child's peak: a small one starts the script
MEASURE = """
import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
seconds = time.perf_counter() - start
print(code, seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3)
"""


def time_script(script, units):
    """units, wall seconds and peak resident memory in MB of a script's whole process."""
    command = [sys.executable, "-c", MEASURE, sys.executable, *script]
    code, seconds, peak = map(float, subprocess.check_output(command).split())
    if code != 0:
        raise ValueError(f"{shlex.join(script)}: exit {code:.0f}")
    return units, seconds, peak


def main(argv) -> int:
    return run_work("prepare", argv, __doc__, PrepareOptions, compare_preparing)
