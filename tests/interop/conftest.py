"""Checkpoints of many shapes, and one with its export."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_CONFIG
from litgpt.model import GPT
from litgpt.utils import copy_config_files, save_config

from litgpt_moe.config import MoEConfig
from tools import export_hf


@pytest.fixture(scope="session")
def make_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path
) -> Callable[..., Path]:
    """A function that writes a checkpoint of TINY_CONFIG with changes: random weights, norms far from one."""

    def make(is_tied: bool = False, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
        config = MoEConfig(**{**TINY_CONFIG, **changes})
        torch.manual_seed(1)
        model = GPT(config)
        for name, parameter in model.named_parameters():
            scale = 0.5 if name.endswith("gate.weight") else 0.1
            torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=scale)
        if is_tied:
            model.lm_head.weight = model.transformer.wte.weight
        folder = tmp_path_factory.mktemp("exported") / "final"
        folder.mkdir()
        torch.save({"model": model.to(dtype).state_dict()}, folder / "lit_model.pth")
        save_config(config, folder)
        copy_config_files(tiny_tokenizer_dir, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def mixtral(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """A checkpoint and its export, GGUF included."""
    checkpoint, out = make_checkpoint(n_head=4, n_query_groups=2), tmp_path_factory.mktemp("hf") / "out"
    assert export_hf.main([str(checkpoint), str(out), "--gguf", "--no-check"]) == 0
    return SimpleNamespace(checkpoint=checkpoint, out=out)
