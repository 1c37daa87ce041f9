"""Check this machine before the first run: packages, device, disk, and what training would use.

Run: uv run python tools/env_sanity_check.py (10 to 30 s, most of it imports)

The last line is a verdict. Status 0: ready. 1: something is broken.
SKIP_BNB_RUNTIME=1 leaves bitsandbytes alone.

It also runs where packages are missing or broken: at the top only the standard library is imported, and
our own modules only in the last check.
"""

import argparse
import importlib
import importlib.util
import io
import os
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]

if TYPE_CHECKING:
    import torch

MODULES = {"pyyaml": "yaml"}  # where the package's name is not the module's, hyphens aside
GIGABYTE = 1e9
DISK_WANTED = 5 * GIGABYTE  # two checkpoints of MoE-200M with AdamW's state, 12 bytes a parameter
MATMUL_SIZE = 256
# bf16 keeps 8 bits: each rounded input is off by 2^-9 relative, and the errors of 256 products average out
MATMUL_TOLERANCE = 0.02


class Check(NamedTuple):
    """One line of the report."""

    state: str
    """One of ok, note (works, but worth knowing) and BROKEN."""
    subject: str
    detail: str


def verdict(is_good: bool, subject: str, detail: str) -> Check:
    """Return a line that is ok or BROKEN."""
    return Check("ok" if is_good else "BROKEN", subject, detail)


def installed(package: str) -> str | None:
    """Return a package's version, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_python(project: dict[str, Any]) -> Iterator[Check]:
    """Yield whether this Python is one that pyproject.toml allows."""
    from packaging.specifiers import SpecifierSet

    wanted, version = project["requires-python"], platform.python_version()
    fits = version in SpecifierSet(wanted)
    detail = f"{version} on {platform.system()} {platform.machine()}"
    yield verdict(fits, "python", detail if fits else f"{detail}, but {wanted} is needed")


def check_packages(project: dict[str, Any]) -> Iterator[Check]:
    """Yield for each package that pyproject.toml names whether it imports, in a version that is allowed."""
    from packaging.requirements import Requirement

    for line in project["dependencies"]:
        requirement = Requirement(line)
        name, wanted, version = requirement.name, requirement.specifier, installed(requirement.name)
        if version is None:
            yield Check("BROKEN", name, "is not installed; run: uv sync")
            continue
        try:
            importlib.import_module(MODULES.get(name, name.replace("-", "_")))
        except Exception as error:  # noqa: BLE001 (a broken binary package may raise anything)
            yield Check("BROKEN", name, f"{version} does not import: {_first_line(error)}")
            continue
        fits = wanted.contains(version, prereleases=True)
        problem = f"{version}, but pyproject.toml wants {wanted}; run: uv sync"
        yield verdict(fits, name, version if fits else problem)


def check_extras(project: dict[str, Any]) -> Iterator[Check]:
    """Yield which optional packages are there; bitsandbytes is imported only here, and only if allowed."""
    for extra, lines in project.get("optional-dependencies", {}).items():
        for name in (re.split(r"[<>=!~;\[ ]", line)[0] for line in lines):
            version = installed(name)
            if version is None:
                yield Check("note", name, f"not installed (optional: uv sync --extra {extra})")
            else:
                yield check_bitsandbytes(version) if name == "bitsandbytes" else Check("ok", name, version)


def check_bitsandbytes(version: str) -> Check:
    """Return whether 8-bit AdamW works: one real step where CUDA is there, the import elsewhere."""
    if os.environ.get("SKIP_BNB_RUNTIME") == "1":
        return Check("note", "bitsandbytes", f"{version}, not tried (SKIP_BNB_RUNTIME=1)")
    import torch

    try:
        bitsandbytes = importlib.import_module("bitsandbytes")
        if not torch.cuda.is_available():
            return Check("note", "bitsandbytes", f"{version} imports; 8-bit AdamW was not tried without CUDA")
        weight = torch.nn.Parameter(torch.ones(128, 128, device="cuda"))
        weight.grad = torch.ones_like(weight)
        bitsandbytes.optim.AdamW8bit([weight], lr=0.1).step()
    except Exception as error:  # noqa: BLE001 (a wrong CUDA library: OSError, RuntimeError, AttributeError)
        return Check("BROKEN", "bitsandbytes", f"{version} fails: {_first_line(error)}")
    moved = bool((weight < 1).all())
    detail = f"{version}, 8-bit AdamW step {'works' if moved else 'did nothing'}"
    return verdict(moved, "bitsandbytes", detail)


def check_device() -> Iterator[Check]:
    """Yield the device and whether a real 16-bit kernel on it agrees with float32 on the CPU."""
    import torch

    yield matmul_check("cpu", torch.bfloat16)
    if not torch.cuda.is_available():
        built = torch.version.cuda
        build = f"this torch was built for CUDA {built}" if built else "torch has no CUDA"
        yield Check("note", "cuda", f"no device; {build}. Training runs on the CPU, with the demo settings")
        return
    for index in range(torch.cuda.device_count()):
        try:
            gpu = torch.cuda.get_device_properties(index)
            detail = f"{gpu.name}, {gpu.total_memory / GIGABYTE:.0f} GB, SM{gpu.major}{gpu.minor}"
            yield Check("ok", f"cuda:{index}", f"{detail}, CUDA {torch.version.cuda}")
            # bf16 from SM80 on; in fp16 older ones train
            yield matmul_check(f"cuda:{index}", torch.bfloat16 if gpu.major >= 8 else torch.float16)
        except Exception as error:  # noqa: BLE001 (a driver too old, a card too new: each has its own)
            yield Check("BROKEN", f"cuda:{index}", _first_line(error))


def matmul_check(device: str, dtype: "torch.dtype") -> Check:
    """Return whether a matrix product on `device` in `dtype` agrees with float32 on the CPU."""
    import torch

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, generator=generator) for _ in range(2))
    exact = a @ b
    got = (a.to(device, dtype) @ b.to(device, dtype)).float().cpu()
    error = ((got - exact).norm() / exact.norm()).item()
    name = str(dtype).removeprefix("torch.")
    detail = f"{name} matmul is off by {error:.1e} from float32 (limit {MATMUL_TOLERANCE})"
    # NaN is not below the limit either
    return verdict(error < MATMUL_TOLERANCE, f"{device} kernel", detail)


def check_disk() -> Iterator[Check]:
    """Yield the space that is free where checkpoints go."""
    free = shutil.disk_usage(ROOT).free
    detail = f"{free / GIGABYTE:.1f} GB free at {ROOT}"
    if free < DISK_WANTED:
        yield Check("note", "disk", f"{detail}; a long run of MoE-200M wants {DISK_WANTED / GIGABYTE:.0f} GB")
    else:
        yield Check("ok", "disk", detail)


def check_plan() -> Iterator[Check]:
    """Yield what run_train.py would use on this machine without flags."""
    import torch

    names = ("config", "hardware", "kernels.choice")
    configs, hardware, choice = (importlib.import_module(f"litgpt_moe.{name}") for name in names)
    config = configs.MoEConfig.from_file(ROOT / "model_config.yaml")
    precision, n_devices = hardware.training_device("auto", "auto", 1, None)
    compiles, why = hardware.will_compile("auto", "auto")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = hardware.precision_dtype(precision)
    triton = importlib.util.find_spec("triton")
    yield Check("ok" if triton else "note", "triton", "present" if triton else "absent, nothing is compiled")
    yield Check("ok", "device", f"{device} ({n_devices})")
    reason = " (fp16 with loss scaling: this GPU has no bf16)" if precision == "16-mixed" else ""
    yield Check("ok", "precision", precision + reason)
    yield Check("ok", "attention", f"scaled_dot_product_attention, {attention_path(device, dtype)}")
    yield Check("ok", "experts", choice.describe_kernel(config, device, dtype))
    yield Check("ok", "compile", f"{'compiled' if compiles else 'eager'} ({why})")


def attention_path(device: str, dtype: "torch.dtype") -> str:
    """Return the kernel that torch picks for causal attention, by asking torch."""
    import torch

    if device == "cpu":
        return "fused CPU kernel"
    query = torch.empty(1, 4, 128, 64, device=device, dtype=dtype)
    params = torch.backends.cuda.SDPAParams(query, query, query, None, 0.0, True, False)
    if torch.backends.cuda.can_use_flash_attention(params):
        return "flash"
    return "memory-efficient" if torch.backends.cuda.can_use_efficient_attention(params) else "math (slow)"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def run_checks(project: dict[str, Any]) -> list[Check]:
    """Return every check's line; a check that breaks off is a broken line, and the others still run."""
    checks: dict[str, Callable[[], Iterator[Check]]] = {
        "python": lambda: check_python(project),
        "packages": lambda: check_packages(project),
        "extras": lambda: check_extras(project),
        "device": check_device,
        "disk": check_disk,
        "plan": check_plan,
    }
    lines: list[Check] = []
    for name, check in checks.items():
        try:
            lines += check()
        except Exception as error:  # noqa: BLE001 (without torch the later checks fail: say so and go on)
            lines.append(Check("BROKEN", name, _first_line(error)))
    return lines


def main(argv: list[str] | None = None) -> int:
    """Print the report and its verdict; 0 when training can start, 1 when something is broken."""
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=formatter).parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path or an error may have letters that a code page lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    # as litgpt_moe.cli.run_script: a Jupyter kernel's own, with which the import of matplotlib fails
    if os.environ.get("MPLBACKEND", "").startswith("module:"):
        del os.environ["MPLBACKEND"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = run_checks(project)
    width = max(len(line.subject) for line in lines)
    rows = [f"{line.state:<7} {line.subject:<{width}}  {line.detail}" for line in lines]
    broken = [line.subject for line in lines if line.state == "BROKEN"]
    state = f"broken: {', '.join(broken)}" if broken else "ready, uv run python run_train.py can start"
    try:
        print("\n".join([*rows, f"verdict: {state}"]), flush=True)
    except OSError as error:
        print(f"error: standard output could not be written ({error.strerror})", file=sys.stderr)
        return 1
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
