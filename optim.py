"""How weights are updated: parameter groups, AdamW, Muon, and the learning rate of a step."""

import math

import torch

from config import GPT2Config

AT_ONCE = 2**22  # numbers that are orthogonalized together; more would only take more memory


def learning_rate(step: int, config: GPT2Config) -> float:
    """Learning rate of update number `step` (from 0): linear warmup, then cosine or linear decay to
    min_lr at lr_decay_iters. config's derived fields must be filled in.
    """
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if step >= config.lr_decay_iters:
        return config.min_lr
    progress = (step - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    if config.lr_schedule == "linear":
        share = 1 - progress
    else:
        share = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + share * (config.learning_rate - config.min_lr)


def parameter_groups(model, config: GPT2Config) -> list[dict]:
    """Groups that hold every parameter once: matrices decay, vectors (biases, norms) do not.

    With optimizer "muon" the matrices of the blocks are a group of their own.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon = {
        name for name, p in named if config.optimizer == "muon" and p.ndim == 2 and ".h." in name
    }
    matrices = [p for name, p in named if p.ndim >= 2 and name not in muon]
    vectors = [p for _, p in named if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "muon": False},
        {"params": vectors, "weight_decay": 0.0, "muon": False},
        {
            "params": [p for name, p in named if name in muon],
            "weight_decay": config.weight_decay,
            "muon": True,
        },
    ]
    groups = [group for group in groups if group["params"]]
    assert sum(len(group["params"]) for group in groups) == len(named)
    return groups


def make_optimizer(model, config: GPT2Config) -> torch.optim.Optimizer:
    """AdamW, fused where it can be, or Muon with such an AdamW for what is not a block's matrix."""
    device = next(model.parameters()).device
    options = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "fused": device.type in ("cuda", "cpu"),
    }
    if config.optimizer == "muon":
        dtype = torch.bfloat16 if config.dtype == "bfloat16" else None
        return Muon(parameter_groups(model, config), orthogonalize_dtype=dtype, **options)
    return torch.optim.AdamW(parameter_groups(model, config), **options)


class Muon(torch.optim.AdamW):
    """AdamW whose groups marked `muon` are updated with orthogonalized momentum instead.

    Muon (Jordan 2024) with the update scaled to AdamW's usual size, 0.2 * sqrt(longer side) (Liu et
    al. 2025), so that one learning rate serves both, as beta1 does for the momentum. Matrices of
    one shape are orthogonalized together; the three that c_attn stacks are taken apart first. A
    matrix that fsdp has spread over the processes is put together for it, in each of them: a part
    of it would not do.
    """

    def __init__(self, params, orthogonalize_dtype=None, **options):
        super().__init__(params, **options)
        self.orthogonalize_dtype = orthogonalize_dtype

    @torch.no_grad()
    def step(self, closure=None):
        done = {}  # parameter -> its gradient
        for group in self.param_groups:
            if group["muon"]:
                self._muon_step(group)
                done |= {p: p.grad for p in group["params"]}
        for p in done:
            p.grad = None  # AdamW passes over parameters without a gradient
        loss = super().step(closure)
        for p, grad in done.items():
            p.grad = grad
        return loss

    def _muon_step(self, group):
        found_inf, beta = getattr(self, "found_inf", None), group["betas"][0]
        keep = 1.0 if found_inf is None else 1.0 - found_inf  # 0 where the step must change nothing
        updates = {}  # parameter -> what is subtracted from it
        for p in group["params"]:
            if p.grad is None:
                continue
            state, grad = self.state[p], p.grad
            if not state:
                state["step"] = torch.zeros((), device=p.device)  # AdamW expects one
                state["momentum_buffer"] = torch.zeros_like(p)
            momentum = state["momentum_buffer"]
            if found_inf is not None:  # a mean of itself and itself is itself
                grad = torch.where(found_inf > 0, momentum, grad)
            state["step"] += keep
            momentum.lerp_(grad, 1 - beta)
            updates[p] = whole(grad.lerp(momentum, beta))  # Nesterov
        self._orthogonalize(updates.values())
        params = list(updates)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"] * keep)
        steps = [laid_out_as(p, updates[p]) for p in params]
        torch._foreach_mul_(steps, -group["lr"] * keep)
        torch._foreach_add_(params, steps)

    def _orthogonalize(self, updates):
        """In place, matrices of one shape together."""
        by_shape = {}
        for part in (part for update in updates for part in _square_parts(update)):
            by_shape.setdefault(part.shape, []).append(part)
        for shape, parts in by_shape.items():
            count = max(1, AT_ONCE // shape.numel())
            for i in range(0, len(parts), count):
                some = parts[i : i + count]
                new = orthogonalize(torch.stack(some), self.orthogonalize_dtype)
                torch._foreach_copy_(some, list((new * (0.2 * math.sqrt(max(shape)))).unbind()))


def _square_parts(matrix):
    """c_attn's (3C, C) as its query, key and value matrices; any other matrix as it is. Views."""
    rows, columns = matrix.shape
    return matrix.view(3, columns, columns).unbind() if rows == 3 * columns else (matrix,)


def orthogonalize(matrices, dtype=None, steps: int = 5):
    """The nearest (semi-)orthogonal matrix of each of (N, rows, columns), roughly.

    Newton-Schulz with the quintic of Jordan 2024: singular values end between 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices if dtype is None else matrices.to(dtype)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (N, r, r), r the shorter side
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


# ---------------------------------------------------------------- tensors in parts


def whole(tensor):
    """tensor in one piece, in every process: what fsdp has spread over them is put together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_in_first(tensor):
    """tensor in one piece, in the first process's host memory; None for what fsdp has spread in the
    other processes, which need not keep it.
    """
    if not hasattr(tensor, "full_tensor"):
        return tensor
    tensor = tensor.full_tensor()
    return tensor.cpu() if torch.distributed.get_rank() == 0 else None


def laid_out_as(p, tensor):
    """tensor, which every process has whole, spread over them as the parameter p is."""
    if not hasattr(p, "full_tensor") or tensor.shape != p.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor  # takes a second to import

    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)


# ---------------------------------------------------------------- state by name


def optimizer_state(optimizer, model) -> dict:
    """The optimizer's memory by parameter name, so that it fits any order of parameters. What
    fsdp has spread is whole in the first process, and None in the others.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: {key: whole_in_first(value) for key, value in memory.items()}
        for p, memory in optimizer.state.items()
    }


def load_optimizer_state(optimizer, model, state: dict, fetch=lambda tensor: tensor):
    """Put optimizer_state's memory back; shapes were checked by whoever read it.

    fetch is called for each tensor just before it is needed, and gives the one to use.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    order = [p for group in optimizer.param_groups for p in group["params"]]
    current = optimizer.state_dict()
    current["state"] = {
        i: {key: laid_out_as(p, fetch(v).to(p.device)) for key, v in state[names[id(p)]].items()}
        for i, p in enumerate(order)
        if names[id(p)] in state
    }
    optimizer.load_state_dict(current)
