"""Tokens a second while generating, beside nanoGPT, transformers and CTranslate2.

python bench.py generate --nanogpt nanoGPT --streams 8 --busy 1
python bench.py generate --preset gpt2-xl --ours_only
"""

import importlib.util
import tempfile
from dataclasses import dataclass, replace

import torch
from bench_common import LIMIT, InTurns, compare, read_bandwidth, run_work
from bench_train import as_nanogpt, nanogpt_model

from huggingface import tensors_to_hf
from model import GPT2
from options import integer
from quantize import pack_linears, to_int8
from sampling import Sampling, generate_ids
from utils import autocast


@dataclass(kw_only=True)
class GenerateOptions(InTurns):
    # generating
    streams: integer(1) = 1  # texts generated at once
    new_tokens: integer(1) = 200  # tokens in a text
    nanogpt_share: integer(1) = 1  # nanoGPT generates 1/N of these tokens
    ours_only: bool = False  # leave all others out


def compare_all(options, config) -> dict:
    contenders = {"ours": (ours_generating, config)}
    if config.device == "cpu":
        contenders["ours int8"] = ours_generating, replace(config, dtype="int8")
    return compare_generating(contenders | others(options, config), options, config)


def others(options, config) -> dict:
    if options.ours_only:
        return {}
    if 10 + options.new_tokens > config.block_size:
        limit = f"--block_size {config.block_size} less the prompt's 10"
        raise ValueError(f"--new_tokens {options.new_tokens}: more than {limit}")
    found = {"nanoGPT": (nanogpt_generating, as_nanogpt(config))} if options.nanogpt else {}
    if importlib.util.find_spec("transformers"):
        found["transformers"] = transformers_generating, config
        if config.device == "cpu" and importlib.util.find_spec("ctranslate2"):
            import ctranslate2

            dtypes = {"int8", "bfloat16", "float32"}
            for dtype in sorted(dtypes & ctranslate2.get_supported_compute_types("cpu")):
                other = ctranslate2_generating, replace(config, dtype=dtype)
                found[f"CTranslate2 {dtype}"] = other
    return found


def compare_generating(contenders, options, config) -> dict:
    """Their share is that of the read bandwidth: a step reads all weights but the positions'."""
    results = compare(contenders, options, lambda: read_bandwidth(config))
    with torch.device("meta"):
        parameters = GPT2(replace(config, position="rope")).num_params()
    bandwidth = results.pop(LIMIT)["per_second"]
    for name, result in results.items():
        size = parameters * getattr(torch, contenders[name][1].dtype).itemsize
        result["utilisation"] = result["per_second"] / options.streams * size / bandwidth
    return {"unit": "tokens", "read_bandwidth": bandwidth, "results": results}


def ours_generating(options, config):
    model, prompts = our_model(config, options.streams), prompts_of(options, config).tolist()
    sampling = Sampling(max_new_tokens=options.new_tokens, temperature=1.0, top_k=200)
    return lambda: len(list(generate_ids(model, prompts, sampling))) * options.streams


def our_model(config, rows):
    """As generate.py prepares it for so many rows."""
    torch.manual_seed(0)
    model = GPT2(config).to(config.device).eval()
    model = to_int8(model) if config.dtype == "int8" else model.to(getattr(torch, config.dtype))
    pack_linears(model, rows)
    return model


def prompts_of(options, config):
    """The same 10 tokens for everyone, a row a stream."""
    idx = torch.arange(10, device=config.device) % config.vocab_size
    return idx.expand(options.streams, -1)


def nanogpt_generating(options, config):
    """nanoGPT's sample.py; it has no cache."""
    model, idx = nanogpt_model(options, config)[0].eval(), prompts_of(options, config)
    new_tokens = max(1, options.new_tokens // options.nanogpt_share)

    def sample():
        with torch.no_grad(), autocast(idx.device, config.dtype):
            model.generate(idx, new_tokens, temperature=1.0, top_k=200)
        return new_tokens * options.streams

    return sample


def transformers_generating(options, config):
    model = transformers_model(config).to(config.device, getattr(torch, config.dtype))
    idx = prompts_of(options, config)
    how = {"do_sample": True, "top_k": 200, "temperature": 1.0, "pad_token_id": 0}
    how |= dict.fromkeys(("max_new_tokens", "min_new_tokens"), options.new_tokens)
    return lambda: model.generate(idx, **how)[:, 10:].numel()


def transformers_model(config):
    """transformers' GPT-2 with our weights."""
    import transformers

    shape = {name: getattr(config, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    shape |= {"n_positions": config.block_size, "bos_token_id": None, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    ours = our_model(replace(config, device="cpu", dtype="float32"), 1)
    model.load_state_dict(
        tensors_to_hf(ours.config, ours.state_dict()), strict=False
    )  # the head is tied
    return model


def ctranslate2_generating(options, config):
    """Converted as ctranslate2.converters does it, with the ids as the words of its vocabulary."""
    import ctranslate2
    from ctranslate2.converters.transformers import GPT2Loader

    loader, words = GPT2Loader(), list(map(str, range(config.vocab_size)))
    spec = loader.get_model_spec(transformers_model(config))
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = words[0]
    loader.set_vocabulary(spec, words)
    spec.validate()
    spec.optimize(quantization=config.dtype)
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        threads = torch.get_num_threads()
        model = ctranslate2.Generator(folder, compute_type=config.dtype, intra_threads=threads)
    prompts = [list(map(str, row)) for row in prompts_of(options, config).tolist()]
    how = {"sampling_topk": min(200, len(words)), "include_prompt_in_result": False}
    how |= dict.fromkeys(("max_length", "min_length"), options.new_tokens)
    return lambda: sum(len(r.sequences_ids[0]) for r in model.generate_batch(prompts, **how))


def main(argv) -> int:
    return run_work("generate", argv, __doc__, GenerateOptions, compare_all)
