"""Several processes: joining them, sharding the model, what they exchange; with one, no-ops."""

import contextlib
import datetime
import os
import signal
import time

import torch
import torch._functorch.config
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from logger import log_row, rank, warn, world_size


class PeerError(Exception):
    """Another process died or stopped answering."""

    exit_code = 1


@contextlib.contextmanager
def process_group(device: torch.device, timeout: float = 600, alike: dict | None = None):
    """Join the processes that torchrun started. PeerError, naming the ranks, if one dies or does
    not answer within timeout seconds; ValueError if `alike` differs between ranks. Yields a gloo
    group for agreement on the host; NCCL's timeout is longer, as at it NCCL kills the process.
    """
    if world_size() == 1:
        yield None
        return
    cuda, patience, store = device.type == "cuda", datetime.timedelta(seconds=timeout), None
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=patience))
        store = _store_of_this_start(store, timeout)
        place = {"store": store, "rank": rank(), "world_size": world_size()}
        backend, wait = ("cpu:gloo,cuda:nccl", 2 * patience) if cuda else ("gloo", patience)
        dist.init_process_group(backend, timeout=wait, device_id=device if cuda else None, **place)
        for other, theirs in enumerate(all_gather(alike)):
            if unlike := [name for name in alike or () if theirs[name] != alike[name]]:
                whose = f"process {other} has another {unlike[0]} than process {rank()}"
                raise ValueError(f"{whose}; start all with the same flags and data")
        yield dist.new_group(backend="gloo", timeout=patience)
    except RuntimeError as error:  # gloo raises plain RuntimeError
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise PeerError(f"{_missing_ranks(store)} of {world_size()} did not answer") from error
    dist.destroy_process_group()  # only after success: it could hang waiting for dead ranks


def _store_of_this_start(store, timeout):
    """torchrun's store under a prefix of this start's own, as after a restart it still holds dead
    workers' addresses: the number of workers ever started, once all have read the same.
    """
    store.add("started", 1)
    seen, until = 0, time.monotonic() + timeout
    while time.monotonic() < until:
        if seen != store.add("started", 0):
            seen = store.add("started", 0)
            store.add(f"seen {seen}", 1)
        if store.add(f"seen {seen}", 0) == world_size():
            return dist.PrefixStore(str(seen), store)
        time.sleep(0.01)
    raise dist.DistStoreError(f"not all processes came within {timeout:g} seconds")


def _missing_ranks(store) -> str:
    """The ranks that do not get here: each that does sets a key in the store."""
    try:
        store.set(f"waiting {rank()}", "")
        time.sleep(3 if rank() > 0 else 5)  # the store may be rank 0's, so it leaves last
        missing = [n for n in range(world_size()) if not store.check([f"waiting {n}"])]
    except (AttributeError, RuntimeError):  # there is no store, or rank 0 is gone with it
        missing = [0]
    return " and ".join(f"process {n}" for n in missing) or "a process"


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """All-reduce (sum) in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather(item) -> list:
    """The items of all ranks in the order of the ranks; the same list everywhere."""
    items = [item] * world_size()
    if world_size() > 1:
        dist.all_gather_object(items, item)
    return items


def broadcast_from_rank0(function):
    """Call function on rank 0 alone; every rank returns its result or raises its exception."""
    answer = [None]
    if rank() == 0:
        try:
            answer = [function()]
        except Exception as error:
            answer = [error]
    if world_size() > 1:
        dist.broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


class StopSignals(contextlib.ExitStack):
    """Remembers SIGINT or SIGTERM for the end of the step; a second one leaves at once. Under
    torchrun, which forwards a Ctrl-C that workers already have, one within two seconds is ignored.
    """

    def __init__(self, group=None):
        super().__init__()
        self.group, self.signum = group, 0
        for signum in signal.SIGINT, signal.SIGTERM:
            with contextlib.suppress(ValueError):  # only the main thread may set handlers
                self.callback(signal.signal, signum, signal.signal(signum, self.handle))

    def handle(self, signum, frame):
        if not self.signum:
            self.signum, self.when = signum, time.monotonic()
            if rank() == 0:
                os.write(2, b"\nfinishing this step and saving; once more leaves at once\n")
        elif world_size() == 1 or time.monotonic() - self.when > 2:
            os._exit(128 + signum)

    def received(self) -> int:
        """A signal received by any rank, or 0. Collective: every rank must call it."""
        signum = torch.tensor(self.signum)
        if world_size() > 1:
            dist.all_reduce(signum, dist.ReduceOp.MAX, group=self.group)
        return signum.item()


def shard(model, device, dtype):
    """Shard weights, gradients and optimizer state over all ranks; a block is gathered while it
    computes (fsdp: Zhao et al. 2023). bfloat16's weights are float32, cast when gathered.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    half = torch.bfloat16 if dtype == "bfloat16" else None
    # inputs are not cast: RoPE's cosines and sines stay in float32
    policy = MixedPrecisionPolicy(half, half and torch.float32, cast_forward_inputs=False)
    for part in (*model.transformer.h, model):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def gradient_sync(forward, last: bool):
    """Call before each micro-batch: only the last one's backward all-reduces the gradients."""
    if isinstance(forward, DistributedDataParallel):
        forward.require_backward_grad_sync = last
    elif hasattr(forward, "set_requires_gradient_sync"):  # fsdp
        forward.set_requires_gradient_sync(last)


def compile_model(model):
    """The compiled model; the plain one, with a warning, if any rank has no working compiler."""
    # else recomputed dropout has a random state of its own, which no seed and no checkpoint sets
    torch._functorch.config.graphsafe_rng_functionalization = False
    reason = None
    try:
        torch.compile(torch.exp)(torch.ones((), device=next(model.parameters()).device))
    except Exception as error:  # compilers fail in many ways, none of which needs to end a run
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
    if reasons := list(filter(None, all_gather(reason))):
        warn(f"torch.compile does not work here ({reasons[0]}); training goes on without it")
        return model
    log_row("compiling", "the model, in the first step (about a minute)")
    return torch.compile(model)


def full_state(model, optimizer) -> tuple[dict, dict]:
    """Weights by name and optimizer state by parameter name, full tensors in rank 0's host memory;
    {} on other ranks, which must call it too.
    """
    from torch.distributed.checkpoint import state_dict as dcp  # takes half a second to import

    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = dcp.get_model_state_dict(model, options=options)
    if weights:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]  # tied: one copy
    if not optimizer.state:  # before the first step; querying it would initialize it
        return weights, {}
    state = dcp.get_optimizer_state_dict(model, optimizer, options=options)
    return weights, state.get("state", {})


def load_full_state(model, optimizer, weights: dict, optimizer_state: dict):
    """Load rank 0's full_state; other ranks only say whether there is an optimizer_state."""
    from torch.distributed.checkpoint import state_dict as dcp

    options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=world_size() > 1)
    dcp.set_model_state_dict(model, weights if rank() == 0 else {}, options=options)
    if optimizer_state:
        state = dcp.get_optimizer_state_dict(model, optimizer)  # for its param_groups
        state = state | {"state": optimizer_state} if rank() == 0 else {}
        dcp.set_optimizer_state_dict(model, optimizer, state, options=options)
