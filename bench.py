"""How fast, and against whom: ours and others take turns in one run.

    python bench.py train --nanogpt nanoGPT --batch_size 4 --block_size 256
    python bench.py generate --nanogpt nanoGPT --streams 8 --busy 1
    python bench.py prepare --nanogpt nanoGPT --megabytes 200
    python bench.py plan --preset gpt2-xl --gpus 64     # memory, days; no run
    python bench.py to_loss 1.89 --nanogpt nanoGPT   # seconds to a loss
    python bench.py gpu --nanogpt nanoGPT --save gpu.jsonl   # ten minutes

WORK is docs/bench_WORK.py. nanoGPT is a checkout of karpathy/nanoGPT; others take part where they
are installed. A table of medians is printed, then all as a line of JSON.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from logger import run
from options import parse_args


@dataclass
class Options:
    # every work has its own flags: bench.py WORK --help
    work: Literal["train", "generate", "prepare", "plan", "to_loss", "gpu"]  # what to measure


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    work = parse_args(Options, argv[:1], __doc__, "bench.py WORK [its flags]").work
    sys.path.append(str(Path(__file__).with_name("docs")))
    return importlib.import_module(f"bench_{work}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(run(main))
