"""The script that measures a GPU: its parts and their budgets, what is kept of one that fails, the wheels."""

import ast
import json
import os
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, wait_until

from tools.benchmarks import gpu_parts, gpu_run, gpu_wheels, layer, machine, measure_gpu, train
from tools.benchmarks.gpu_parts import Part, parts_of
from tools.benchmarks.gpu_run import MeasureGpu, Measurement

WRITE = "import json, sys; open(sys.argv[1], 'w').write(json.dumps({'speed': 3})); "


def measurement(folder: Path, minutes: float = 1.0) -> Measurement:
    return Measurement(MeasureGpu(minutes=minutes), folder / "gpu.json", folder)


def part(folder: Path, name: str, code: str, budget_s: float = 60) -> Part:
    out = folder / f"{name}.json"
    return Part(name, budget_s, [["-c", code, str(out)]], out)


def test_a_part_that_fails_is_told_and_its_results_and_output_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = measurement(tmp_path)
    assert not measured.run(part(tmp_path, "bad", WRITE + "sys.exit('no such instruction')"))
    assert measured.run(part(tmp_path, "good", WRITE + "print('done')"))
    parts = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["parts"]
    assert [(name, each["status"]) for name, each in parts.items()] == [
        ("bad", "failed with status 1"),
        ("good", "ok"),
    ]
    assert parts["bad"]["results"] == parts["good"]["results"] == {"speed": 3}
    assert "no such instruction" in capsys.readouterr().out
    log = (tmp_path / "gpu.log").read_text(encoding="utf-8")
    assert "no such instruction" in log and "done" in log


@pytest.mark.skipif(sys.platform == "win32", reason="it looks for processes as Linux has them")
def test_a_part_is_ended_at_its_budget_with_what_it_started_and_keeps_its_results(tmp_path: Path) -> None:
    child = "import subprocess, time; p = subprocess.Popen(['sleep', '600']); "
    note = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(600)"
    measured = measurement(tmp_path)
    began = time.monotonic()
    assert not measured.run(part(tmp_path, "endless", WRITE + child + note, budget_s=5))
    assert time.monotonic() - began < 60
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["parts"]["endless"]
    assert found["status"] == "ended at the end of its budget" and found["results"] == {"speed": 3}
    pid = int((tmp_path / "pid").read_text(encoding="utf-8"))

    def is_gone() -> bool:
        state = Path(f"/proc/{pid}/stat")
        return not state.is_file() or state.read_text(encoding="utf-8").split()[2] == "Z"

    wait_until(is_gone)


def test_what_no_time_is_left_for_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not measurement(tmp_path, minutes=0.0).run(part(tmp_path, "late", "raise SystemExit(3)"))
    assert "left out: no time left" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_parts_are_commands_that_the_scripts_take(device: str, tmp_path: Path) -> None:
    parts = {each.name: each for each in parts_of(device, tmp_path, "/usr/bin/python3", 1.0)}
    assert list(parts)[:4] == ["imports", "check", "sync", "run"]
    commands = [command for each in parts.values() for command in each.commands]
    for command in commands:
        script = command[1] if command[0] == "-m" else command[0]
        if script.startswith("tools."):
            assert (ROOT / f"{script.replace('.', '/')}.py").is_file()
        for word in command:
            assert "{" not in word and (not word.startswith("configs/") or (ROOT / word).is_file())
    flags = {name: parts[name].commands[0][2:] for name in ("layer", "train_200m", "generate", "check")}
    assert machine.parse("", layer.LayerBenchmark, flags["layer"]).hf_python == "/usr/bin/python3"
    train.parse(flags["train_200m"])
    for name in ("generate", "check"):
        assert machine.parse("", gpu_parts.GpuPart, flags[name]).device == device
    assert sum(each.budget_s for each in parts.values()) < 900
    assert any(path.endswith("test_triton.py") for path in gpu_parts.tests_on_gpu())


@pytest.mark.parametrize("name", ["measure_gpu", "gpu_wheels"])
def test_what_runs_before_the_wheels_are_there_needs_nothing_but_python(name: str) -> None:
    tree = ast.parse((ROOT / f"tools/benchmarks/{name}.py").read_text(encoding="utf-8"))
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)}
    outside = {each for each in names if each.split(".")[0] not in sys.stdlib_module_names}
    assert outside <= {"tools.benchmarks.gpu_wheels"} and len(names) > 5


def test_a_folder_without_wheels_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure_gpu.main(["--wheels", str(tmp_path)]) == 1
    said = f"error: --wheels {tmp_path}: there is no .whl in it; fill it with pip download\n"
    assert capsys.readouterr().err == said


def write_wheel(folder: Path) -> None:
    """A package of one line, which asks for a torch that is not there."""
    metadata = "Metadata-Version: 2.1\nName: tiny-package\nVersion: 1.0\nRequires-Dist: torch<1\n"
    with zipfile.ZipFile(folder / "tiny_package-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_package.py", "ANSWER = 42\n")
        wheel.writestr("tiny_package-1.0.dist-info/METADATA", metadata)
        tags = "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr("tiny_package-1.0.dist-info/WHEEL", tags)
        wheel.writestr("tiny_package-1.0.dist-info/RECORD", "")


@pytest.mark.slow
def test_the_environment_has_the_wheels_and_this_python_s_torch(tmp_path: Path) -> None:
    write_wheel(tmp_path)
    python = gpu_wheels.make_environment(tmp_path / "venv", tmp_path)
    code = "import sys, torch, tiny_package; print(torch.__version__, tiny_package.ANSWER, sys.prefix)"
    said = gpu_wheels._run([python, "-c", code])
    assert said.split() == [torch.__version__, "42", str(tmp_path / "venv")]
    (tmp_path / "broken-1.0-py3-none-any.whl").write_bytes(b"no zip")
    with pytest.raises(gpu_wheels.CannotInstall, match="cannot be made: "):
        gpu_wheels.make_environment(tmp_path / "again", tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, and would be measured")
def test_without_a_gpu_it_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert measure_gpu.main([]) == 2
    assert capsys.readouterr().err.startswith("error: this torch sees no CUDA device; ")
    assert measure_gpu.main(["--device", "cpu", "--only", "check,nonsense"]) == 2
    assert "--only 'nonsense': choose of imports, check, sync" in capsys.readouterr().err


@pytest.mark.by_hand
def test_a_rehearsal_runs_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(os.cpu_count()))
    out = tmp_path / "rehearsal.json"
    flags = ["--device", "cpu", "--minutes", "60", "--budget_share", "10", "--out", str(out)]
    status = measure_gpu.main(flags)
    parts = json.loads(out.read_text(encoding="utf-8"))["parts"]
    assert {name: each["status"] for name, each in parts.items()} == dict.fromkeys(parts, "ok")
    assert status == 0 and list(parts) == [each.name for each in parts_of("cpu", tmp_path, "", 1.0)]
    assert parts["check"]["results"]["all right"] is True
    assert parts["sync"]["results"]["compiled step"] == {"right": True}
    assert any("kernels of MoE-200M" in name for name in parts["steps_200m"]["results"])
    assert parts["train_200m"]["results"]["of_stock"] > 0
    ours, stock = (parts["generate"]["results"][f"{name}, MoE-200M, 32-true"] for name in ("ours", "stock"))
    assert ours["tokens"] == stock["tokens"]
    assert gpu_run._read(tmp_path / "none.json") is None
