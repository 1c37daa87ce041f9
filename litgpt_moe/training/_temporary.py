"""Stand-ins for modules that are being written elsewhere, under the names agreed on.

For the integrator: delete this file, and point each `from litgpt_moe.training._temporary import ...` at the
modules named below.
"""

import contextlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from litgpt import GPT, Config

from litgpt_moe.files import read_json
from moe_layers import (  # noqa: F401
    CHECKPOINT_FILE,
    CONFIG_FILE,
    DTYPES,
    MoEConfig,
    find_checkpoint,
    has_selection_bias,
    moe_layers,
    read_state,
    use_selection_bias,
    verify_checkpoint,
)
from prepare_data import DEMO_MODEL, MANIFEST, SPLITS, TextShards  # noqa: F401
from prepare_data import read_tokenizer as read_tokenizer_facts  # noqa: F401
from wandb_dataset import pull  # noqa: F401

DEFAULT_DATA_DIR = Path("data/custom_text")

# --- litgpt_moe.config --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelFacts:
    """What one configuration costs."""

    total_params: int
    active_params: int
    flops_per_token: int


def meta_model(config: Config) -> GPT:
    """Return the model on the meta device."""
    with torch.device("meta"):
        return GPT(config)


def model_facts(config: Config, block_size: int | None = None) -> ModelFacts:
    """Return the facts of a model."""
    model = meta_model(config)
    total = sum(p.numel() for p in model.parameters())
    in_experts = sum(p.numel() for layer in moe_layers(model).values() for p in layer.experts.parameters())
    active = total - in_experts * (config.n_expert - config.n_expert_per_token) // max(config.n_expert, 1)
    embedding = config.padded_vocab_size * config.n_embd
    attention = 12 * config.n_layer * config.n_head * (config.head_size or 0)
    attention *= block_size or config.block_size
    return ModelFacts(total, active, 6 * (active - embedding) + attention)


# --- litgpt_moe.hardware ------------------------------------------------------------------------------------


def has_cuda() -> bool:
    """Return whether torch sees a CUDA device."""
    return torch.cuda.is_available()


def training_device(
    accelerator: str, devices: int | str, num_nodes: int, precision: str | None
) -> tuple[str, int]:
    """Return the precision and the number of devices on this machine."""
    cuda = torch.cuda.is_available() and accelerator in ("auto", "cuda", "gpu")
    if accelerator in ("cuda", "gpu") and not cuda:
        raise ValueError(
            f"accelerator is {accelerator} but this torch sees no CUDA device; use accelerator: cpu"
        )
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise ValueError("accelerator is mps but this machine has none; use accelerator: cpu")
    present = torch.cuda.device_count() if cuda else None
    number = (present or 1) if devices in ("auto", "-1", -1) else devices
    if not str(number).isdecimal() or int(number) < 1:
        raise ValueError(f"devices is {devices!r}; choose auto or a number of 1 or more")
    if present is not None and int(number) > present:
        raise ValueError(f"devices is {number} but this machine has {present} CUDA device(s)")
    has_bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    precision = precision or ("bf16-true" if has_bf16 else "32-true")
    choices = ("32-true", "bf16-true", "bf16-mixed")
    if precision not in choices:
        raise ValueError(f"precision is {precision!r}; choose one of {', '.join(choices)}")
    if precision.startswith("bf16") and cuda and not has_bf16:
        raise ValueError(f"precision is {precision}, which this GPU lacks; use 32-true")
    if cuda and sys.platform == "win32" and int(number) * num_nodes > 1:
        raise ValueError("several GPUs need NCCL, which Windows lacks; use devices: 1, or Linux (WSL 2)")
    return precision, int(number)


def memory_bytes() -> int:
    """Return the memory that this process may use: the machine's, or less in a container."""
    return min([psutil.virtual_memory().total, *cgroup_limits()])


def cgroup_limits(root: Path = Path("/")) -> list[int]:
    """Return the limits of memory in bytes that a container or a service gives this process (Linux)."""
    limits = []
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            top, name = ("", "memory.max") if not controllers else ("memory", "memory.limit_in_bytes")
            group = Path(path.strip("/"))
            for part in (group, *group.parents):
                with contextlib.suppress(OSError, ValueError):
                    limits.append(int((root / "sys/fs/cgroup" / top / part / name).read_text("utf-8")))
    return limits


# --- litgpt_moe.checkpoints.layout: SETTINGS_FILE, checkpoints_of; .reader: all else ------------------------

SETTINGS_FILE = "train_config.yaml"


def checkpoints_of(out_dir: Path) -> list[Path]:
    """Return the checkpoints in a run's folder, whole or not, the one of the last step first."""
    steps = {path: int(path.name[5:]) for path in out_dir.glob("step-*") if path.name[5:].isdecimal()}
    if (final := out_dir / "final").is_dir():
        steps[final] = -1
        with contextlib.suppress(OSError, ValueError):
            steps[final] = int(read_json(final / "checkpoint.json").get("step", -1))
    return sorted(steps, key=lambda path: (steps[path], path.name), reverse=True)


def checkpoint_flaw(folder: Path) -> str | None:
    """Return why a checkpoint cannot be resumed from, None if it is whole; its name is left to the caller."""
    try:
        read_training_state(folder)
    except (ValueError, OSError) as error:
        return flaw_words(error, folder)
    return None


def flaw_words(error: Exception, folder: Path) -> str:
    """Return the words of an error of read_training_state without the folder's name and the way out.

    For the integrator: what reader.checkpoint_flaw does with its error; resume.py needs it for its own.
    """
    reason = str(error).removeprefix(str(folder)).lstrip(f": {os.sep}")
    return re.split("; (?:use|resume from) another", reason)[0]


def read_training_state(folder: Path) -> dict[str, Any]:
    """Return the content of a checkpoint that training can go on from, every file of it checked."""
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder}: it was not written to its end; use another checkpoint")
    verify_checkpoint(folder)
    state = read_state(folder / CHECKPOINT_FILE)
    check_state(state, folder)
    return state


def check_state(state: dict[str, Any], folder: Path) -> None:
    """Check that training can go on from `state`; raises ValueError."""
    if "step_count" not in state:
        raise ValueError(f"{folder} holds weights alone; start from it with --initial_checkpoint_dir")
    named = re.fullmatch(r"step-(\d+)", folder.name)
    if type(state["step_count"]) is not int or (named and int(named[1]) != state["step_count"]):
        raise ValueError(
            f"{folder}: its training state is damaged: step_count is {state['step_count']!r:.40}; resume "
            f"from another step-*, or start from its weights with --initial_checkpoint_dir {folder}"
        )


def weights_of(state: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """Return the model's state dict in the content of `path`.

    For the integrator: what reader.read_weights does once it has read the state.
    """
    weights = state.get("model", state)
    if not isinstance(weights, dict) or not all(isinstance(w, torch.Tensor) for w in dict.values(weights)):
        raise ValueError(
            f"{path} holds no model weights; give a checkpoint that run_train.py or LitGPT wrote"
        )
    return dict(dict.items(weights))


def check_weights(folder: Path, config: Config, weights: dict[str, torch.Tensor]) -> None:
    """Raise ValueError unless `weights` are of a model of `config`."""
    model = meta_model(config)
    if has_selection_bias(weights):
        use_selection_bias(model)
    expected = model.state_dict()
    where = f"{folder}: the weights do not fit the model config {config.name}:"
    if missing := [name for name in expected if name not in weights]:
        raise ValueError(f"{where} they lack {missing[0]} ({len(missing)} missing)")
    if extra := [name for name in weights if name not in expected]:
        raise ValueError(f"{where} they have an unexpected {extra[0]!s:.80} ({len(extra)} too many)")
    for name, tensor in expected.items():
        if tensor.shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)}, the config wants {tuple(tensor.shape)}"
            raise ValueError(f"{where} {name} is {shapes}")
        if weights[name].dtype not in (*DTYPES.values(), torch.float64):
            raise ValueError(
                f"{where} {name} is of {weights[name].dtype}, not of float32, bfloat16 or float16"
            )
