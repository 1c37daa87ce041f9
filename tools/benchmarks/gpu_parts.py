"""The parts of measure_gpu.py: which commands, in which order, and how many seconds each may take."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tools.benchmarks.machine import ROOT

CHECKS, SPEED = ("-m", "tools.benchmarks.gpu_checks"), ("-m", "tools.benchmarks.gpu_speed")
# of rehearsals: what `gpu_step.TINY` is for the other parts
TINY = "n_layer=1 n_embd=32 n_head=2 n_expert=4 n_expert_per_token=2 moe_intermediate_size=16 block_size=32"


@dataclass(frozen=True)
class GpuPart:
    """The settings of a part of measure_gpu.py."""

    part: str = ""
    """What to do."""
    device: Literal["cuda", "cpu"] = "cuda"
    """What to compute on; on a CPU the models are tiny."""
    model_config: Path = ROOT / "configs/moe_200m.yaml"
    """Model configuration."""
    micro_batch_sizes: str = "16"
    """Sequences of a micro-batch, one size after the other."""
    steps: int = 10
    """Timed steps of each size."""
    out: Path = Path("part.json")
    """JSON file, written whole after each result."""


@dataclass(frozen=True)
class Part:
    """One part: commands for Python, each started if the one before succeeded."""

    name: str
    budget_s: float
    commands: list[list[str]]
    out: Path
    """JSON that the commands write, whole after each result."""
    must_pass: bool = False
    """Whether the other parts are pointless without it."""


def parts_of(device: str, folder: Path, hf_python: str, budget_share: float) -> list[Part]:
    """Return the parts, what tells most first; `folder` is for their files.

    On a CPU it is a rehearsal of all of them on models that take seconds. `hf_python` has Transformers, or is
    "". Budgets are in seconds on a GPU, times `budget_share`.
    """
    is_cpu, parts = device == "cpu", []

    def add(name: str, budget_s: float, *commands: list[object], must_pass: bool = False) -> None:
        out = folder / f"{name}.json"
        words = [[str(word) for word in command] for command in commands]
        filled = [[word.replace("{out}", str(out)) for word in command] for command in words]
        parts.append(Part(name, budget_s * budget_share, filled, out, must_pass))

    def speed(name: str, config: str, sizes: str, part: str = "steps") -> list[object]:
        flags = ["--part", part, "--device", device, "--model_config", ROOT / config, "--out", "{out}"]
        return [
            *SPEED,
            *flags,
            "--micro_batch_sizes",
            "2" if is_cpu else sizes,
            "--steps",
            2 if is_cpu else 10,
        ]

    imports = "import litgpt, lightning, jsonargparse, tokenizers, litgpt_moe.training.loop, moe_layers"
    add("imports", 60, ["-c", imports], must_pass=True)
    for name, budget_s in (("check", 90), ("sync", 60)):
        add(name, budget_s, [*CHECKS, "--part", name, "--device", device, "--out", "{out}"])
    add("run", 70, *_short_run(folder, is_cpu))
    add("steps_200m", 110, speed("steps_200m", "configs/moe_200m.yaml", "16,32,64", "profile"))
    add("layer", 60, _layer(device, hf_python))
    add("train_200m", 90, _train(is_cpu, "configs/moe_200m.yaml"))
    add("steps_30m", 50, speed("steps_30m", "configs/moe_30m_debug.yaml", "64,128"))
    add("steps_400m", 80, speed("steps_400m", "configs/moe_400m.yaml", "16,32"))
    add("generate", 40, speed("generate", "configs/moe_200m.yaml", "1", "generate"))
    add("tests", 120, ["-m", "pytest", "-m", "gpu", "-n", "0", "-q", *tests_on_gpu()])
    return parts


def tests_on_gpu() -> list[str]:
    """Return the files with tests marked gpu: to collect all others takes longer, and packages not there."""
    files = sorted((ROOT / "tests").glob("**/test_*.py"))
    return [str(file) for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def _short_run(folder: Path, is_cpu: bool) -> list[list[object]]:
    """Return the commands of a short real run: prepare the demo stories, train, resume, generate."""
    data, tokenizer, out = folder / "data", folder / "tokenizer", folder / "run"
    prepare = ["prepare_data.py", "--dataset", "demo", "--data_dir", data, "--tokenizer_dir", tokenizer]
    train = [
        "run_train.py",
        "--model_config",
        "configs/demo_model.yaml",
        "--config",
        "configs/demo_train.yaml",
    ]
    train += ["--data_dir", data, "--tokenizer_dir", tokenizer, "--out_dir", out]
    n_tokens = (8192, 16384) if is_cpu else (200_000, 400_000)
    story = ["generate.py", "--ckpt_dir", out / "final", "--prompt", "One day", "--max_tokens", 20]
    runs = [[*train, "--max_tokens", n, "--resume", "auto"] for n in n_tokens]
    return [[*prepare, "--train_tokenizer", 2048], *runs, story]


def _layer(device: str, hf_python: str) -> list[object]:
    flags = ["--device", device, "--out", "{out}", "--hf_env", "", "--hf_python", hf_python]
    if device == "cpu":
        small = ["--shapes", "30M", "--dtypes", "float32", "--tokens", 64, "--rounds", 1, "--only", "loop"]
        return ["-m", "tools.benchmarks.layer", *flags, *small]
    return ["-m", "tools.benchmarks.layer", *flags, "--tokens", 16384, "--rounds", 10, "--shapes", "200M,E64"]


def _train(is_cpu: bool, config: str) -> list[object]:
    command = ["-m", "tools.benchmarks.train", "--model_config", config, "--rounds", 1, "--out", "{out}"]
    if is_cpu:
        return [*command, "--steps", 1, "--compile", "off", "--override", *TINY.split()]
    return [*command, "--steps", 10, "--micro_batch_size", 16]
