"""What the parts of measure_gpu.py share: a training step without LitGPT's loop, its models, its records."""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from litgpt.model import GPT

from litgpt_moe import balance
from litgpt_moe.config import MoEConfig
from litgpt_moe.files import write_json
from litgpt_moe.hardware import DTYPES, avoid_wrong_gradients
from litgpt_moe.kernels.matmul import use_fast_linear
from litgpt_moe.loss import defer_head, linear_cross_entropy
from litgpt_moe.training.optimizer import make_optimizer
from litgpt_moe.training.settings import Settings
from tools.benchmarks.machine import ROOT

# the rehearsal on a CPU: every part on models that take seconds
TINY = {
    "n_layer": 1,
    "n_embd": 32,
    "n_head": 2,
    "n_expert": 4,
    "n_expert_per_token": 2,
    "moe_intermediate_size": 16,
    "block_size": 32,
    "vocab_size": 512,
    "padded_vocab_size": 512,
}
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "weight_decay": 0.1}}


def model_config(path: str | Path, device: str) -> MoEConfig:
    """Return a configuration of this checkout; on a CPU a tiny one."""
    tiny: dict[str, Any] = TINY if device == "cpu" else {}
    return MoEConfig.from_file(ROOT / path, **tiny)


@dataclass
class Records:
    """Results that lie on the disk as soon as they are known."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, value: Any) -> None:
        """Write and print a result."""
        self.values[name] = value
        print(f"{name}: {value}", flush=True)
        write_json(self.path, self.values)

    def attempt(self, name: str, act: Callable[[], Any]) -> bool:
        """Add what `act` returns, or what it raised; return whether it raised nothing."""
        try:
            self.add(name, act())
        except Exception as error:  # noqa: BLE001 (what a device cannot do is a result)
            self.add(name, {"failed": f"{type(error).__name__}: {error}"[:2000]})
            return False
        return True


def compiled(module: Any, device: str) -> Any:
    """Return the compiled module; on a CPU by a backend that does not take minutes."""
    avoid_wrong_gradients()
    backend = "inductor" if device == "cuda" else "aot_eager"
    return torch.compile(module, backend=backend, dynamic=False)


def build_model(config: MoEConfig, device: str, precision: str) -> GPT:
    """Return a model with LitGPT's initial weights, as training prepares it."""
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT(config)
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            torch.nn.init.normal_(module.weight, std=math.sqrt(2.0 / 5 / config.n_embd))
    model.to(DTYPES[precision])
    use_fast_linear(model)
    balance.set_balance(model, aux_loss_coef=0.01, z_loss_coef=0.001, bias_update_rate=0.001)
    return model


class TrainStep:
    """Whole training steps of a model, as in a run but without Fabric and logs."""

    def __init__(self, config: MoEConfig, device: str, precision: str, is_compiled: bool = True) -> None:
        self.config, self.device = config, device
        self.model = build_model(config, device, precision)
        self.head = defer_head(self.model)
        self.optimizer = make_optimizer(Settings(), self.model, ADAMW)
        self.run: Callable[[torch.Tensor], torch.Tensor] = (
            compiled(self.model, device) if is_compiled else self.model
        )

    def tokens(self, micro_batch_size: int) -> torch.Tensor:
        """Return seeded random tokens, one more than the length of a sequence."""
        shape = (micro_batch_size, self.config.block_size + 1)
        draw = torch.Generator().manual_seed(1)
        return torch.randint(self.config.vocab_size, shape, generator=draw).to(self.device)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the loss; its backward pass computes the gradients."""
        hidden, targets = self.run(tokens[:, :-1]), tokens[:, 1:]
        assert self.head is not None
        return linear_cross_entropy(hidden, self.head.weight, targets)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Take a step; return its loss, on the device."""
        loss = self.loss(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        balance.update_selection_bias(self.model)
        return loss.detach()


def now(device: str) -> float:
    """Return the time, once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def small_config(device: str) -> MoEConfig:
    """Return MoE-30M with two layers, which compiles in a fraction of a minute."""
    return shorter(model_config("configs/moe_30m_debug.yaml", device), 2)


def shorter(config: MoEConfig, n_layer: int) -> MoEConfig:
    """Return the configuration with so many layers."""
    return dataclasses.replace(config, n_layer=n_layer)
