"""Runs the parts of measure_gpu.py, each in a process with a budget, and keeps their results."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from litgpt_moe.cli import WorkFailed, fail, note, run_command
from litgpt_moe.files import write_json
from litgpt_moe.flags import FlagParser, add_flags, from_flags
from tools.benchmarks.gpu_parts import Part, parts_of
from tools.benchmarks.machine import ROOT, check_counts, results_path

POLL_S = 1.0


@dataclass(frozen=True)
class MeasureGpu:
    """What is measured, and for how long at most."""

    device: Literal["cuda", "cpu"] = "cuda"
    """What to measure; cpu rehearses every part on tiny models."""
    minutes: float = 10.0
    """All parts together; what is left out at the end is told."""
    budget_share: float = 1.0
    """What each part's budget is multiplied by."""
    only: str = ""
    """Names of parts, separated by commas (default: all)."""
    wheels: Path | None = None
    """Folder of wheels that this Python lacks; installed into an environment that is deleted afterwards."""
    hf_python: str = ""
    """Python with Transformers 5, for its blocks (default: the one that started this, if it has them)."""
    out: Path | None = None
    """JSON to write (default: in results/, named by the GPU); the .log lies beside it."""


class Measurement:
    """Runs the parts and keeps their results."""

    def __init__(self, settings: MeasureGpu, out: Path, folder: Path) -> None:
        self.out, self.log, self.folder = out, out.with_suffix(".log"), folder
        self.ends = time.monotonic() + 60 * settings.minutes
        self.results: dict[str, Any] = {"device": settings.device, "parts": {}}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_text("", encoding="utf-8")

    def run(self, part: Part) -> bool:
        """Run a part within its budget and the time left; return whether it succeeded."""
        began = time.monotonic()
        ends = min(began + part.budget_s, self.ends)
        status, entry = "left out: no time left", {}
        self.results["parts"][part.name] = entry
        for command in part.commands if began < self.ends else []:
            status = self._run(command, part, ends)
            if status != "ok":
                break
        seconds = round(time.monotonic() - began, 1)
        entry |= {"status": status, "seconds": seconds, "budget_s": part.budget_s, "results": _read(part.out)}
        write_json(self.out, self.results)
        print(f"{part.name:12} {seconds:6.1f} s  {status}", flush=True)
        if status != "ok":
            print(self._tail(), flush=True)
        return status == "ok"

    def _run(self, command: list[str], part: Part, ends: float) -> str:
        """Return "ok", or what became of the command; its results so far are written meanwhile."""
        with self.log.open("a", encoding="utf-8") as log:
            print(f"\n> python {' '.join(command)}", file=log, flush=True)
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                while process.poll() is None and time.monotonic() < ends:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(POLL_S)
                    found = _read(part.out)
                    if found != self.results["parts"][part.name].get("results"):
                        self.results["parts"][part.name]["results"] = found
                        write_json(self.out, self.results)
                if process.poll() is None:
                    return "ended at the end of its budget"
            finally:
                _end(process)
        return "ok" if process.returncode == 0 else f"failed with status {process.returncode}"

    def _environment(self) -> dict[str, str]:
        caches = {
            name: str(self.folder / name.lower()) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        }
        own = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
        return {**os.environ, **caches, **own}

    def _tail(self, n_lines: int = 12) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(f"    {line[:200]}" for line in lines[-n_lines:])


def _end(process: subprocess.Popen[Any]) -> None:
    """End a part's process and those that it has started."""
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True, check=False)
    process.wait()


def _read(path: Path) -> Any:
    """Return the content of a part's JSON; None before its first result."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def measure(settings: MeasureGpu) -> str:
    """Run the parts; return what to print at the end. WorkFailed if nothing can be run."""
    out = settings.out or results_path(str(ROOT / "tools/benchmarks/measure_gpu.py"), settings.device)
    own = sys.executable if importlib.util.find_spec("transformers") else ""
    hf_python = settings.hf_python or own
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        parts = parts_of(settings.device, folder, hf_python, settings.budget_share)
        wanted = settings.only.split(",") if settings.only else [part.name for part in parts]
        if unknown := [name for name in wanted if name not in [part.name for part in parts]]:
            raise ValueError(f"--only {unknown[0]!r}: choose of {', '.join(part.name for part in parts)}")
        measurement = Measurement(settings, out, folder)
        failed = []
        for part in parts:
            if part.name in wanted and not measurement.run(part):
                failed.append(part.name)
                if part.must_pass:
                    break
    if failed:
        raise WorkFailed(f"{', '.join(failed)}: see {measurement.log}; the results are in {out}")
    return f"Written to {out}"


def main(argv: list[str], description: str | None) -> int:
    """Return 0; 1 if a part failed or was ended; 2 for bad settings or without a GPU."""
    parser = FlagParser(prog="measure_gpu.py", description=description)
    add_flags(parser, MeasureGpu)
    settings: MeasureGpu = from_flags(MeasureGpu, parser.parse_args(argv))
    check_counts(parser, settings)
    import torch

    if settings.device == "cuda" and not torch.cuda.is_available():
        more = "--device cpu rehearses; tools/env_sanity_check.py says more"
        return fail(f"this torch sees no CUDA device; {more}", 2)
    if settings.device == "cpu":
        note("A rehearsal on the CPU with tiny models: its figures mean nothing.")
    # so that the part is ended too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return run_command(lambda: measure(settings))
