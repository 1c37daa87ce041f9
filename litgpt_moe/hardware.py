"""The machine: which device and precision to use, how fast it is, and how much memory it has."""

import contextlib
import ctypes
import importlib.util
import math
import os
import platform
import re
import shutil
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch.torch_version import TorchVersion

from litgpt_moe.kernels.matmul import matmul
from litgpt_moe.words import choose_one

DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}
# no 16-true: with weights in fp16 small updates are lost, and Adam's moments underflow
TRAINING_PRECISIONS = ("32-true", "bf16-true", "bf16-mixed", "16-mixed")
GIB = 1 << 30
# not measured: CUDA's context and libraries take 0.3 to 0.6 GiB of a card, a desktop about as much
RESERVED_BYTES = GIB
# for what the allocator loses between its blocks
FRAGMENTATION = 1.05
# by the makers: GiB of memory, and TFLOP/s of dense products in bf16 or fp16 with sums in float32, which
# GeForce cards do at half their rate for sums in fp16; in float32 for GTX cards and the P100
CARDS = {
    **{"GTX 1060": (6, 4.4), "GTX 1070": (8, 6.5), "GTX 1080": (8, 8.9), "GTX 1080 Ti": (11, 11.3)},
    **{"GTX 1660": (6, 5.0), "RTX 2060": (6, 25.8), "RTX 2070": (8, 29.9), "RTX 2080": (8, 40.3)},
    **{"RTX 2080 Ti": (11, 53.8), "TITAN RTX": (24, 130.5), "RTX 3050": (8, 18.2), "RTX 3060": (12, 25.5)},
    **{"RTX 3060 Ti": (8, 32.4), "RTX 3070": (8, 40.6), "RTX 3070 Ti": (8, 43.5), "RTX 3080": (10, 59.5)},
    **{"RTX 3080 Ti": (12, 68.2), "RTX 3090": (24, 71), "RTX 3090 Ti": (24, 80), "RTX 4060": (8, 30.2)},
    **{"RTX 4060 Ti": (8, 44.1), "RTX 4070": (12, 58.3), "RTX 4070 Ti": (12, 80.2), "RTX 4080": (16, 97.5)},
    **{"RTX 4090": (24, 165.2), "RTX 5060": (8, 38.4), "RTX 5060 Ti": (16, 47.4), "RTX 5070": (12, 61.7)},
    **{"RTX 5070 Ti": (16, 87.9), "RTX 5080": (16, 112.6), "RTX 5090": (32, 209.5)},
    **{"RTX A2000": (12, 31.9), "RTX A4000": (16, 76.7), "RTX A5000": (24, 111.1), "RTX A6000": (48, 154.8)},
    **{"P100": (16, 10.6), "V100": (16, 125), "T4": (16, 65), "L4": (24, 121), "A10": (24, 125)},
    **{"L40S": (48, 362), "A100": (40, 312), "H100": (80, 989), "H200": (141, 989)},
}


def has_cuda() -> bool:
    """Return whether torch sees a CUDA device."""
    return torch.cuda.is_available()


def _has_bf16() -> bool:
    return has_cuda() and torch.cuda.is_bf16_supported(including_emulation=False)


def _has_fast_fp16() -> bool:
    # from V100 on, the first with tensor cores
    return has_cuda() and torch.cuda.get_device_capability() >= (7, 0)


def default_precision(device_type: str) -> str:
    """Return bf16-true for a GPU that computes in it, 32-true elsewhere: to use a model."""
    return "bf16-true" if device_type == "cuda" and _has_bf16() else "32-true"


def _training_precision(precision: str | None, is_cuda: bool) -> str:
    """Return the precision that a run's setting means; ValueError if this machine cannot train in it."""
    if precision in (None, "auto"):
        # float32 runs at an eighth of fp16's speed on a T4
        is_fp16 = is_cuda and not _has_bf16() and _has_fast_fp16()
        return "16-mixed" if is_fp16 else default_precision("cuda" if is_cuda else "cpu")
    if precision not in TRAINING_PRECISIONS:
        raise ValueError(f"precision is {precision!r}; {choose_one(precision, TRAINING_PRECISIONS)}")
    if precision.startswith("bf16") and is_cuda and not _has_bf16():
        instead = "16-mixed" if _has_fast_fp16() else "32-true"
        raise ValueError(f"precision is {precision}, which this GPU lacks; use {instead}")
    if precision == "16-mixed" and not is_cuda:
        # Fabric would take bf16-mixed on a CPU, with a warning
        raise ValueError("precision is 16-mixed, which is for CUDA; use bf16-mixed or 32-true")
    return precision


def precision_dtype(precision: str) -> torch.dtype:
    """Return the dtype of the matrix products in a precision of Lightning's name, such as bf16-mixed."""
    return DTYPES[precision.replace("mixed", "true")]


def pick_device(device: str, precision: str) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype for the --device and --precision of generate.py and evaluate.py."""
    if precision not in ("auto", *DTYPES):
        raise ValueError(f"--precision {precision} is unknown; choose auto, {', '.join(DTYPES)}")
    if device == "auto":
        device = "cuda" if has_cuda() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
        if chosen.type == "meta":
            raise RuntimeError("it computes nothing")
    except (RuntimeError, AssertionError, ImportError) as error:  # without CUDA torch raises AssertionError
        reason = str(error).splitlines()[0]
        if reason.startswith("Expected one of"):  # followed by thirty device names
            reason = "torch knows no such device"
        raise ValueError(f"--device {device} cannot be used here ({reason}); choose cpu or auto") from None
    return chosen, DTYPES[default_precision(chosen.type) if precision == "auto" else precision]


def training_device(
    accelerator: str, devices: int | str, num_nodes: int, precision: str | None
) -> tuple[str, int]:
    """Return the precision and the number of devices on this machine that a run's settings mean."""
    cuda = has_cuda() and accelerator in ("auto", "cuda", "gpu")
    if accelerator in ("cuda", "gpu") and not cuda:
        lack = "this torch sees no CUDA device"
        raise ValueError(f"accelerator is {accelerator} but {lack}; use accelerator: cpu")
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise ValueError("accelerator is mps but this machine has none; use accelerator: cpu")
    n_gpus = torch.cuda.device_count() if cuda else 0
    count = str((n_gpus or 1) if devices in ("auto", "-1", -1) else devices)
    n_devices = int(count) if count.isdecimal() else 0
    if n_devices < 1:
        raise ValueError(f"devices is {devices!r}; choose auto (or -1, the same) or a number of 1 or more")
    if cuda and n_devices > n_gpus:
        raise ValueError(f"devices is {n_devices} but this machine has {n_gpus} CUDA device(s)")
    precision = _training_precision(precision, cuda)
    if cuda and sys.platform == "win32" and n_devices * num_nodes > 1:
        raise ValueError("several GPUs need NCCL, which Windows lacks; use devices: 1, or Linux (WSL 2)")
    return precision, n_devices


def will_compile(compile: str, accelerator: str) -> tuple[bool, str]:
    """Return whether a run compiles the model, given its `compile` setting (auto, on or off), and why."""
    if compile != "auto":
        return compile == "on", f"compile: {compile}"
    if accelerator == "cpu" or not has_cuda():
        return False, "no CUDA; compiling takes minutes on a CPU"
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed (on Windows: triton-windows)"
    if sys.platform == "linux" and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return False, "there is no C compiler, which Triton needs; install gcc"
    return True, "CUDA and Triton"


def missing_compiler() -> str | None:
    """Return the C++ compiler by which torch.compile makes code for a CPU, if it is not here."""
    # on Windows torch looks for Visual Studio's in several places
    if sys.platform == "win32" or os.environ.get("TORCH_INDUCTOR_INSTALL_GXX"):
        return None
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return None if shutil.which(name) else name


def avoid_wrong_gradients() -> None:
    """Switch off a fusion of Inductor with which the gradients of an RMSNorm are silently wrong.

    Called before anything is compiled. `mix_order_reduction` came with torch 2.10 (pytorch issues 193061, and
    190796: NaN in bf16 on an RTX 5090); the correction (pull request 193103) is in 2.14.
    """
    if TorchVersion(torch.__version__) < "2.14":
        from torch._inductor import config  # not at the top: it takes a second, which eager runs do not need

        config.triton.mix_order_reduction = False


def peak_flops(device: torch.device, precision: str) -> float:
    """Return the FLOP/s of dense matrix products on `device`: its maker's figure, else measured here."""
    dtype = precision_dtype(precision)
    with warnings.catch_warnings(), contextlib.suppress(ValueError):
        warnings.simplefilter("ignore")
        if device.type == "cuda" and (known := get_available_flops(device, dtype)):
            return float(known)
    size, best = (4096 if device.type == "cuda" else 1024), math.inf
    one = torch.ones(size, size, dtype=dtype, device=device)
    for _ in range(5 if device.type == "cuda" else 20):  # a CPU may be busy with other work for a while
        started = time.perf_counter()
        matmul(one, one)[0, 0].item()  # waits for the product
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def memory_bytes() -> int:
    """Return the memory that this process may use: the machine's, or less where a cgroup limits it."""
    return min([psutil.virtual_memory().total, *cgroup_limits()])


def cgroup_limits(root: Path = Path("/")) -> list[int]:
    """Return the memory limits in bytes that a container or a service sets for this process (Linux)."""
    limits = []
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)  # "0::/a/b" in version 2, "9:memory:/a/b" in 1
            if controllers and "memory" not in controllers.split(","):
                continue
            top, name = ("", "memory.max") if not controllers else ("memory", "memory.limit_in_bytes")
            group = Path(path.strip("/"))
            # the limit of each parent group holds too; a container sees its own group as the root, whatever
            # the path says
            for part in (group, *group.parents):
                file = root / "sys/fs/cgroup" / top / part / name
                with contextlib.suppress(OSError, ValueError):  # "max": none
                    limits.append(int(file.read_text(encoding="utf-8")))
    return limits


def gpu_bytes(n_devices: int) -> int:
    """Return the memory of the smallest of the first CUDA devices of this machine."""
    return min(torch.cuda.get_device_properties(n).total_memory for n in range(n_devices))


def peak_memory_gb() -> float:
    """Return the peak memory in 1e9 bytes: the GPU's where there is one, else this process's."""
    if has_cuda():
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 1e9
    import resource  # not at the top: Windows has no such module

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def keep_freed_memory() -> None:
    """Have glibc keep freed memory, up to this process's peak, for the next step or chunk of logits.

    By default glibc returns blocks of more than 32 MB, and the top of its heap, to the system. Fetching them
    again takes 80,000 page faults in a step of MoE-30M (2,048 tokens, chunks of logits of 64 MB, Xeon): a
    tenth of its time; the peak of 100 steps grows from 2.72 to 2.96 GB. evaluate.py scores the same model
    1.7 times as fast (chunks of 128 MB, EPYC), in 1.9 GB instead of 1.4.
    """
    mallopt(mmap_max=0, trim_threshold=-1)


def mallopt(**values: int) -> None:
    """Set parameters of glibc's malloc (its manual: "Malloc Tunable Parameters"); a no-op without glibc."""
    numbers = {"trim_threshold": -1, "mmap_threshold": -3, "mmap_max": -4}  # in malloc.h
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        for name, value in values.items():
            libc.mallopt(numbers[name], value)


def cpu_name() -> str:
    """Return the processor's name, as far as the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def machine() -> dict[str, str | int]:
    """Return processor, GPU where there is one, threads, system and versions, to record beside figures."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
    } | {name: version(name) for name in ("torch", "litgpt", "tokenizers")}


def card_bytes(text: str) -> int:
    """Return the memory of a card given by its name (RTX 3060) or its memory (12GB); ValueError otherwise."""
    # a card's GB are GiB
    if match := re.fullmatch(r"(\d{1,4}(?:\.\d+)?) ?(?:GB|GiB|G)?", text.strip(), re.IGNORECASE):
        return round(float(match[1]) * GIB)
    if (card := _card(text)) is None:
        raise ValueError(f"{text!r} is no card that is known here; give its memory, as in 12GB")
    return card[0] * GIB


def card_flops(text: str) -> float | None:
    """Return the peak FLOP/s of a card in training, None for one that is not known here by its name."""
    card = _card(text)
    return None if card is None else card[1] * 1e12


def _card(text: str) -> tuple[int, float] | None:
    words = re.sub(r"nvidia|geforce|tesla|laptop gpu", "", text, flags=re.IGNORECASE).split()
    known = {name.lower().replace(" ", ""): card for name, card in CARDS.items()}
    return known.get("".join(words).lower())


def fits(peak: int, memory: int) -> bool:
    """Return whether a step with this peak runs on a card with this memory, with a margin."""
    return peak * FRAGMENTATION + RESERVED_BYTES <= memory
