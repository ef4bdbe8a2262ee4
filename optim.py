"""How weights are updated: parameter groups, AdamW, Muon, and the learning rate of a step."""

import math

import torch

from config import LR_SCHEDULES, GPT2Config

# max elements orthogonalized per batch; beyond its cache a CPU gains nothing
ORTHOGONALIZE_AT_ONCE = {"cpu": 2**22, "cuda": 2**26}


def learning_rate(step: int, config: GPT2Config) -> float:
    """Learning rate of update number `step` (from 0): linear warmup, then one of LR_SCHEDULES down
    to min_lr at lr_decay_iters; config's derived fields are filled in.
    """
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if step >= config.lr_decay_iters:
        return config.min_lr
    progress = (step - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    share = LR_SCHEDULES[config.lr_schedule](progress)
    return config.min_lr + share * (config.learning_rate - config.min_lr)


def parameter_groups(model, config: GPT2Config) -> list[dict]:
    """Matrices, vectors (not decayed) and, with Muon, the blocks' matrices as a third group."""
    matrices, vectors, muon, decay = [], [], [], config.weight_decay
    for name, p in model.named_parameters():
        is_muon = config.optimizer == "muon" and ".h." in name
        group = vectors if p.ndim < 2 else muon if is_muon else matrices
        group.append(p)
    groups = (matrices, decay, False), (vectors, 0.0, False), (muon, decay, True)
    return [{"params": p, "weight_decay": d, "muon": m} for p, d, m in groups if p]


def make_optimizer(model, config: GPT2Config) -> torch.optim.AdamW:
    """AdamW (fused if available), or Muon for block matrices with AdamW for the rest."""
    settings = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2)}
    settings["fused"] = next(model.parameters()).device.type in ("cuda", "cpu")
    if config.optimizer == "muon":
        dtype = torch.bfloat16 if config.dtype == "bfloat16" else None
        return Muon(parameter_groups(model, config), orthogonalize_dtype=dtype, **settings)
    return torch.optim.AdamW(parameter_groups(model, config), **settings)


class Muon(torch.optim.AdamW):
    """AdamW whose groups marked `muon` are updated with orthogonalized momentum instead (Jordan
    2024), times 0.2 * sqrt(longer side) (Liu et al. 2025), about AdamW's size, so that one learning
    rate serves both; beta1 is its momentum.
    """

    def __init__(self, params, orthogonalize_dtype=None, **settings):
        super().__init__(params, **settings)
        self.orthogonalize_dtype = orthogonalize_dtype

    @torch.no_grad()
    def step(self, closure=None):  # torch.distributed gives one, which is None
        """Update all groups; if self.found_inf is 1, nothing changes."""
        all_groups = self.param_groups
        for group in all_groups:
            if group["muon"]:
                self._muon_step(group)
        self.param_groups = [group for group in all_groups if not group["muon"]]  # for AdamW
        super().step()
        self.param_groups = all_groups

    def _muon_step(self, group):
        found_inf, beta = getattr(self, "found_inf", None), group["betas"][0]
        params = [p for p in group["params"] if p.grad is not None]
        updates = []
        for p in params:
            state, grad = self.state[p], p.grad
            if not state:
                state["step"] = torch.zeros((), device=p.device)  # AdamW.__setstate__ requires it
                state["momentum_buffer"] = torch.zeros_like(p)
            momentum = state["momentum_buffer"]
            if found_inf is not None:  # keeps the momentum unchanged on overflow
                grad = torch.where(found_inf > 0, momentum, grad)
            momentum.lerp_(grad, 1 - beta)
            updates.append(full_tensor(grad.lerp(momentum, beta)))  # Nesterov
        self._orthogonalize(updates)
        applied = 1.0 if found_inf is None else 1.0 - found_inf.to(params[0].dtype)
        torch._foreach_add_([self.state[p]["step"] for p in params], [applied] * len(params))
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"] * applied)
        updates = [shard_like(p, update) for p, update in zip(params, updates, strict=True)]
        torch._foreach_mul_(updates, -group["lr"] * applied)
        torch._foreach_add_(params, updates)

    def _orthogonalize(self, updates):
        """Orthogonalize in place, matrices of equal shape together, c_attn as its Q, K and V."""
        by_shape = {}
        for update in updates:
            rows, columns = update.shape
            for part in update.view(-1, columns, columns) if rows == 3 * columns else [update]:
                by_shape.setdefault(part.shape, []).append(part)
        for shape, parts in by_shape.items():
            most = ORTHOGONALIZE_AT_ONCE.get(parts[0].device.type, 2**22)  # numbers
            count = max(1, most // shape.numel())
            for i in range(0, len(parts), count):
                batch = parts[i : i + count]
                new = orthogonalize(torch.stack(batch), self.orthogonalize_dtype)
                torch._foreach_copy_(batch, list((new * (0.2 * math.sqrt(max(shape)))).unbind()))


def orthogonalize(matrices, dtype=None, steps: int = 5):
    """Approximate nearest semi-orthogonal matrix to each of (N, rows, columns): Newton-Schulz with
    the quintic of Jordan 2024; singular values end between 0.7 and 1.2.
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


def full_tensor(tensor):
    """The full tensor: gathered if FSDP sharded it, else unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(p, tensor):
    """Shard a replicated tensor like parameter p."""
    if not hasattr(p, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # takes a second to import

    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)
