"""The machine: device, precision, memory, seeds."""

import contextlib
import ctypes
import os
import re
import sys
from pathlib import Path

import torch

# dense bf16/fp16 tensor-core peaks in FLOP/s, from the makers' data sheets
PEAK_FLOPS = (
    {"B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H200 NVL": 835e12}
    | {"H100": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "A100": 312e12, "L40S": 362e12}
    | {"V100": 125e12, "T4": 65e12, "RTX 4090": 165e12, "RTX 3090": 71e12}
)


def pick_device(name: str | None = None) -> torch.device:
    """The device to use, on CUDA one for each process; ValueError if it is not there."""
    there = [kind for kind in ("cuda", "mps", "cpu") if getattr(torch, kind).is_available()]
    name = there[0] if name is None else name
    if not re.fullmatch(rf"({'|'.join(there)})(:\d\d?)?", name):
        raise ValueError(f"--device {name}: not there, or not for this torch; use {there[0]}")
    device = torch.device(name)
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
        device, count = torch.device("cuda", index), torch.cuda.device_count()
        if index >= count:
            raise ValueError(f"--device {device}: there are {count} GPUs, one a process")
    return device


def pick_dtype(device: torch.device) -> str:
    """bfloat16 if the device computes in it, else float16 on CUDA, else float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device.type == "cpu":  # AVX512-BF16, AMX or Arm's BF16
        with contextlib.suppress(OSError):
            flags = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
            if re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags):
                return "bfloat16"
    return "float32"


def autocast(device: torch.device, dtype: str):
    """Mixed precision: matrix products in bf16 or fp16, weights and sums kept in float32."""
    return torch.autocast(device.type, getattr(torch, dtype), dtype in ("bfloat16", "float16"))


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """tensor on the device; on CUDA copied asynchronously, from pinned memory."""
    if device.type == "cuda":
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """The device's peak in FLOP/s at this precision, None if unknown."""
    if device.type != "cuda" or dtype not in ("bfloat16", "float16"):
        return None
    name = torch.cuda.get_device_name(device)
    other = r"(?! (PCIe|NVL|Ti|D|Laptop)\b)"  # a name that continues so is a different GPU's
    found = (peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b{other}", name))
    return next(found, None)


def peak_mb(device: torch.device) -> float | None:
    """Peak memory in MB: of a CUDA device's tensors, else resident; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    with contextlib.suppress(ImportError):
        import resource

        unit = 1e6 if sys.platform == "darwin" else 1e3  # macOS counts bytes, others kilobytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def set_up_device(device: torch.device, thrifty: bool = False):
    """CUDA: TF32 for float32 matmuls; no cuDNN attention, which plans anew for each length. CPU:
    malloc keeps freed memory (else a step takes half as long again), thrifty: below 1 MB only.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cuda.enable_cudnn_sdp(False)
    elif device.type == "cpu":
        trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # names of mallopt(3)
        with contextlib.suppress(OSError, AttributeError):  # another C library
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(trim_threshold, 2**17 if thrifty else -1)
            libc.mallopt(mmap_max, 2**16 if thrifty else 0)
            libc.mallopt(mmap_threshold, 2**20)


@contextlib.contextmanager
def deterministic(on: bool = True):
    """Require deterministic kernels, or not; an operation without one raises RuntimeError."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, changes no result
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def out_of_memory(remedy: str):
    """Turn running out of memory, told by type or message, into a ValueError with remedy."""
    try:
        yield
    except Exception as error:
        texts = "out of memory|ALLOC_FAILED|DefaultCPUAllocator"
        if not isinstance(error, MemoryError) and not re.search(texts, str(error)):
            raise
        problem = ValueError(f"out of memory: {remedy}")
        problem.rank_local = True  # other ranks may not hit it, so each prints its own
        raise problem from error


def derived_seed(*numbers: int) -> int:
    """A 63-bit seed from a few integers (splitmix64, Steele 2014), the same everywhere."""
    mask, state = 2**64 - 1, 0
    for value in numbers:
        state = (state + (value & mask) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1
