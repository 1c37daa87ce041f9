"""What the tests of export and import share: texts, shapes of models, and how results are read."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from litgpt_moe.checkpoints.reader import read_weights

TEXTS = [
    "Tom had a red ball.",
    '"No!" she said.\n\nTwo  spaces,\ttab.',
    "caf\u00e9 \U0001f431 <0x41> 42",
    "Lily </s> saw",
]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 16}
DENSE = {
    "mlp_class_name": "LLaMAMLP",
    "n_expert": 0,
    "n_expert_per_token": 0,
    "moe_intermediate_size": None,
    "intermediate_size": 24,
}
QWEN = {"norm_qk": True, "n_expert_per_token": 3, "norm_eps": 1e-6}


def transformers_model(folder: Path) -> torch.nn.Module:
    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return read_weights(checkpoint / "lit_model.pth")


def refusal(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], *argv: object) -> str:
    """The one line of an error with status 2."""
    assert main([str(arg) for arg in argv]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("error: ")
    return line
