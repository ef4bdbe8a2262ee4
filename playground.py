"""A page in the browser, served from this machine, to write with a model and to look inside it.

    python playground.py --open
    python playground.py --checkpoint gpt2 --port 8080

From Python: `from playground import attention, candidates, logit_lens, surprise`.
Shapes: T tokens, P places among them, L layers, H heads, D channels of a head, V vocabulary.
"""

import asyncio
import base64
import json
import math
import socket
import sys
import time
import webbrowser
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, with_config

from checkpoint import ModelOptions, describe_model, load_model
from files import check_json, optional
from logger import log_row, run, warn
from model import apply_rotary, attention_mask, context_limit, context_start, rotary_cos_sin
from options import integer, parse_args
from sampling import Sampling, TextStream, generate_ids, logits_to_probs, prompt_ids

TEXT_TOKENS, REQUEST_BYTES, CONNECTIONS = 2048, 2**18, 64  # at most
BODY_SECONDS, PAUSE_SECONDS = 10, 0.1  # for a request to come; between messages with tokens
SHOWN, COLUMNS = 10, 6  # candidates; tokens in the table of layers
POLICY = "default-src 'self' 'unsafe-inline' data:; base-uri 'none'; frame-ancestors 'none'"


@dataclass
class Options(ModelOptions):
    # where the page is
    host: str = "127.0.0.1"  # address to listen on; any other lets other machines in
    port: integer(0, 65535) = 8000  # 0 takes a free one
    open: bool = False  # open it in the browser


@with_config(extra="forbid")
@dataclass
class Ask(Sampling):
    """What the page sends: a text or the ids of its tokens, a place among them, settings."""

    max_new_tokens: integer(0, TEXT_TOKENS) = 200  # tokens to add to the text
    text: str = ""
    ids: list[int] | None = None
    place: integer(0) = 0


def outputs_of(modules, model, ids):
    """What each of L modules puts out when the model reads ids: (L, T, ...)."""
    found = []
    with ExitStack() as hooks:
        for m in modules:
            hooks.enter_context(m.register_forward_hook(lambda *args: found.append(args[-1])))
        model.hidden(torch.tensor([ids], device=next(model.parameters()).device))
    return torch.cat(found)


@torch.inference_mode()
def attention(model, ids, places=slice(None)):
    """How much the tokens at P places attend to themselves and those before: (L, H, P, T)."""
    config, T = model.config, len(ids)
    qkv = outputs_of([block.attn.c_attn for block in model.transformer.h], model, ids).float()
    qk = qkv.view(config.n_layer, T, 3, config.n_head, -1).permute(2, 0, 3, 1, 4)[:2]
    positions = torch.arange(T, device=qk.device)[None]  # (1, T)
    if config.position == "rope":
        qk = apply_rotary(qk, *rotary_cos_sin(positions, qk.shape[-1], qk.dtype))
    mask = attention_mask(config, positions[:, places], T)  # (1, 1 or H, P, T)
    ones = torch.eye(T, device=qk.device).expand(*qk.shape[1:3], T, T)  # as values: weights alone
    return F.scaled_dot_product_attention(qk[0][:, :, places], qk[1], ones, mask)


@torch.inference_mode()
def logit_lens(model, ids, places=slice(None)):
    """What each layer would say were it the last (nostalgebraist 2020): logits (L, P, V)."""
    stream = outputs_of(model.transformer.h, model, ids)[:, places]  # (L, P, C)
    return model.lm_head(model.transformer.ln_f(stream)).float()


@torch.inference_mode()
def candidates(model, ids, sampling=None):
    """Of all that could follow, the likeliest first: ids, probabilities, those when drawn; (V,)."""
    sampling, start = sampling or Sampling(), context_start(len(ids), context_limit(model.config))
    logits = logit_lens(model, ids[start:], [-1])[-1]  # (1, V)
    p, kept = logits_to_probs(logits, sampling)  # (1, K) each
    after = torch.zeros_like(logits).scatter(1, kept, p / p.sum())
    before, order = torch.softmax(logits[0], dim=-1).sort(descending=True, stable=True)
    return order, before, after[0, order]


@torch.inference_mode()
def surprise(model, ids):
    """-log2 of each token's probability, in bits: (T,), 0 for the first; T is not limited."""
    limit = context_limit(model.config)
    idx = torch.tensor(ids, device=next(model.parameters()).device)
    nats = torch.zeros(len(ids))
    for start, places in groupby(range(1, len(ids)), lambda place: context_start(place, limit)):
        places = [*places]
        logits = model(idx[None, start : places[-1]])[0][0, -len(places) :].float()  # (P, V)
        nats[places] = F.cross_entropy(logits, idx[places], reduction="none").cpu()
    return nats / math.log(2)


def look(model, ids, ask) -> dict:
    """What the page shows of the token at a place; that may be the one after the text."""
    past, present = ids[: max(1, ask.place)], ids[: ask.place + 1]
    order, before, after = candidates(model, past, ask)
    rank = (order == ids[ask.place]).nonzero().item() if ask.place < len(ids) else None
    rows = sorted({*range(min(SHOWN, len(order))), rank or 0})
    seen, start = (context_start(len(i), context_limit(model.config)) for i in (past, present))
    lens = logit_lens(model, past[seen:], slice(-COLUMNS, None))  # (L, P, V)
    chance, said = lens.softmax(dim=-1).max(dim=-1)
    weights = attention(model, present[start:], [-1]).cpu().numpy()  # (L, H, 1, S), float32
    return {
        "candidates": torch.stack([order, before, after], dim=1)[rows].tolist(),
        "rank": rank,
        "kept": int((after > 0).sum()),
        "start": start,
        "attention": base64.b64encode(weights).decode(),
        "said": said.tolist(),
        "chance": chance.tolist(),
    }


def write(model, ids, ask, tokenizer):
    """Yield ids, the prompt's and new ones; with the last of them the text of generate.py."""
    row, text, some, until = TextStream(tokenizer, ask.stop), "", [*ids], 0
    for [token] in generate_ids(model, [ids], ask):
        text += row.push(token)
        some += [token] * (token != tokenizer.eot_id)
        if row.done:
            break
        if time.monotonic() > until:
            yield {"ids": some}
            some, until = [], time.monotonic() + PAUSE_SECONDS
    yield {"ids": some, "text": text + row.push(None)}


def application(model, tokenizer, name, hosts):
    """The ASGI application; one thread does all the work with the model."""
    from starlette import applications, requests, responses, routing
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    worker, turn, spelt = ThreadPoolExecutor(1), asyncio.Lock(), tokenizer.decode_bytes
    with torch.device("meta"):  # the shapes of an int8 model's weights are not among its own
        shapes = {name: list(p.shape) for name, p in type(model)(model.config).named_parameters()}
    facts = {
        "name": name,
        "about": describe_model(model, tokenizer),
        "shapes": shapes,
        "config": asdict(model.config),
        "settings": TypeAdapter(Ask).json_schema(),
        "bytes": [spelt([i]).decode("latin-1") for i in range(tokenizer.vocab_size)],
        "eot": tokenizer.eot_id,
    }

    def in_worker(function, *arguments):
        return asyncio.get_running_loop().run_in_executor(worker, function, *arguments)

    async def events(ids, ask):
        async with turn:  # one text at a time; looking at tokens goes on in between
            pieces = write(model, ids, ask, tokenizer)
            while piece := await in_worker(next, pieces, None):
                yield f"data: {json.dumps(piece)}\n\n"

    async def answer(request):
        if request.headers.get("origin", "") not in ("", f"http://{request.headers.get('host')}"):
            return responses.PlainTextResponse("a page from elsewhere cannot use this one", 403)
        ask = check_json(await asyncio.wait_for(request.body(), BODY_SECONDS), Ask)
        ids = ask.ids or prompt_ids(tokenizer, ask.text)
        if len(ids) > TEXT_TOKENS:
            raise ValueError(f"the text has {len(ids):,} tokens; the page takes {TEXT_TOKENS:,}")
        spelt(ids)  # raises for an id that is none
        if request.url.path == "/write":
            return responses.StreamingResponse(events(ids, ask), media_type="text/event-stream")
        if request.url.path == "/look":
            return responses.JSONResponse(await in_worker(look, model, ids, ask))
        start = context_start(len(ids), context_limit(model.config))
        bits = (await in_worker(surprise, model, ids)).tolist()
        return responses.JSONResponse({"ids": ids, "bits": bits, "start": start})

    async def refuse(request, error):
        return responses.PlainTextResponse(str(error) or "too slow", 400)

    html = Path(__file__).with_name("playground.html").read_text("utf-8")
    page = responses.HTMLResponse(html, headers={"content-security-policy": POLICY})
    routes = [routing.Route(f"/{p}", answer, methods=["POST"]) for p in ("read", "look", "write")]
    routes += routing.Route("/", page), routing.Route("/facts", responses.JSONResponse(facts))
    gone = requests.ClientDisconnect, TimeoutError
    refused = dict.fromkeys((ValueError, torch.OutOfMemoryError, *gone), refuse)
    limits = {"exception_handlers": refused, "max_body_size": REQUEST_BYTES}
    return TrustedHostMiddleware(applications.Starlette(routes=routes, **limits), hosts)


def main(argv=None) -> int:
    options = parse_args(Options, argv, __doc__)
    uvicorn, _ = (optional(name, "requirements-web.txt") for name in ("uvicorn", "starlette"))
    try:
        listener = socket.create_server((options.host, options.port))
    except OSError as error:
        raise ValueError(f"--port {options.port}: {error.strerror}; try --port 0") from None
    model, tokenizer = load_model(options.checkpoint, options.device, options.dtype)
    hosts = ["*"] if options.host == "0.0.0.0" else ["127.0.0.1", "localhost", options.host]
    if options.host not in hosts[:2]:
        warn(f"--host {options.host}: whoever reaches this machine can use the model")
    address = f"http://{options.host}:{listener.getsockname()[1]}"
    log_row("page", f"{address} (Ctrl-C ends it)")
    if options.open:
        webbrowser.open(address)
    app = application(model, tokenizer, options.checkpoint or "./checkpoints", hosts)
    settings = {"limit_concurrency": CONNECTIONS, "timeout_graceful_shutdown": 1}
    config = uvicorn.Config(app, log_level="error", lifespan="off", **settings)
    uvicorn.Server(config).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
