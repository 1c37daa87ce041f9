"""A run of run_train.py in the `workspace` of conftest.py, and what it left."""

import contextlib
import csv
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from litgpt import GPT
from litgpt.utils import save_config

import run_train
from litgpt_moe.checkpoints.state import tensors_of
from litgpt_moe.config import MoEConfig
from litgpt_moe.flags import normalize_flags
from litgpt_moe.training import loop
from litgpt_moe.training import run as run_module
from litgpt_moe.training.run import set_up
from litgpt_moe.training.settings import Settings, saved_text

# what a clock or the machine says; everything else must be equal
TIMING = {"time_s", "tokens_per_s", "iter_time", "remaining_time", "peak_memory_gb", "mfu"}
BALANCED = ("--moe.aux_loss_coef", 0.01, "--moe.z_loss_coef", 0.001, "--moe.bias_update_rate", 0.01)


def run(*flags: object) -> int:
    """Return the status of run_train.py in this process, with the settings of `workspace`."""
    return run_train.main(["--config", "train_config.yaml", *map(str, flags)])


def refusal(*flags: object) -> str:
    """Return what a run in `workspace` with these flags is refused for; nothing is written."""
    argv = normalize_flags(["--config", "train_config.yaml", *map(str, flags)])
    with pytest.raises((ValueError, OSError)) as raised:
        set_up(argv)
    assert sorted(path.name for path in Path().iterdir()) == ["model_config.yaml", "train_config.yaml"]
    return str(raised.value)


def save(folder: str, step: int, **settings: object) -> Path:
    """Write a checkpoint of LitGPT's own loop, which has no record of its files."""
    config = MoEConfig.from_file("model_config.yaml")
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "train_dataloader": {"epoch": 0, "n_used": 0, "n_sequences": 93},
        "iter_num": 2 * step,
        "step_count": step,
    }
    path = Path(folder)
    path.mkdir(parents=True)
    torch.save(state, path / "lit_model.pth")
    save_config(config, path)
    plain = yaml.safe_load(saved_text(Settings()))
    plain["train"] |= {"global_batch_size": 4, "max_tokens": 2048}
    (path / "train_config.yaml").write_text(yaml.dump(plain | settings), encoding="utf-8")
    return path


def rows(out_dir: str = "out") -> list[dict[str, str]]:
    with Path(out_dir, "logs/csv/metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def losses(out_dir: str = "out") -> list[float]:
    return [float(row["loss"]) for row in rows(out_dir) if row["loss"]]


def weights(folder: str) -> dict[str, torch.Tensor]:
    return torch.load(Path(folder, "lit_model.pth"), weights_only=True)["model"]


def edit_yaml(path: str, key: str, value: object) -> None:
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    *groups, last = key.split(".")
    target = values
    for group in groups:
        target = target.setdefault(group, {})
    target[last] = value
    Path(path).write_text(yaml.dump(values), encoding="utf-8")


def go_back(step: int, *out_dirs: str) -> None:
    """Delete the checkpoints after a step."""
    for file in (file for out_dir in out_dirs for file in Path(out_dir).glob("*/lit_model.pth")):
        if file.parent.name == "final" or int(file.parent.name.removeprefix("step-")) > step:
            shutil.rmtree(file.parent)


def history(out_dir: str) -> list[dict[str, str]]:
    """The rows of metrics.csv without their times."""
    return [{key: text for key, text in row.items() if key not in TIMING} for row in rows(out_dir)]


def assert_same_run(out_dir: str, expected: str) -> None:
    one, other = (
        torch.load(Path(path, "final/lit_model.pth"), weights_only=True) for path in (out_dir, expected)
    )
    for name, tensor in tensors_of({key: one[key] for key in ("model", "optimizer")}):
        same = dict(tensors_of({key: other[key] for key in ("model", "optimizer")}))[name]
        assert torch.equal(tensor, same), name
    assert one["train_dataloader"] == other["train_dataloader"]
    assert history(out_dir) == history(expected)
    for name in ("expert_load.csv", "stories.csv", "spikes.csv"):
        logs = [Path(path, "logs", name) for path in (out_dir, expected)]
        assert len({log.read_bytes() if log.exists() else None for log in logs}) == 1, name


@contextlib.contextmanager
def loss_times(factor: float, *calls: int) -> Iterator[None]:
    """Multiply the loss of the given calls of LitGPT's loop (1 is the first after its sanity check)."""
    original, n_calls = loop.linear_cross_entropy, 0

    def cross_entropy(hidden: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        nonlocal n_calls
        n_calls += hidden.requires_grad
        loss = original(hidden, *args, **options)
        return loss * factor if hidden.requires_grad and n_calls in calls else loss

    loop.linear_cross_entropy = cross_entropy
    try:
        yield
    finally:
        loop.linear_cross_entropy = original


@contextlib.contextmanager
def gradient_times(factor: float, *calls: int) -> Iterator[None]:
    """Multiply the gradients of the given backward passes (1 is the first), whose losses stay as they are."""
    original, n_calls = loop.TrainingFabric.backward, 0

    def backward(fabric: loop.TrainingFabric, loss: torch.Tensor) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls in calls:
            loss.register_hook(lambda grad: grad * factor)
        original(fabric, loss)

    loop.TrainingFabric.backward = backward
    try:
        yield
    finally:
        loop.TrainingFabric.backward = original


@contextlib.contextmanager
def fp16_on_the_cpu() -> Iterator[None]:
    """Let a run have 16-mixed on a CPU, which a user is refused."""
    choose = run_module.training_device

    def choose_fp16_too(accelerator: str, devices: int, num_nodes: int, precision: str) -> tuple[str, int]:
        if precision != "16-mixed":
            return choose(accelerator, devices, num_nodes, precision)
        return precision, choose(accelerator, devices, num_nodes, "32-true")[1]

    run_module.training_device = choose_fp16_too
    try:
        yield
    finally:
        run_module.training_device = choose
