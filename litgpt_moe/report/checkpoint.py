"""Describe what a checkpoint directory holds and lacks, as lines of text."""

from pathlib import Path
from typing import Any

import torch

from litgpt_moe.checkpoints.layout import CHECKPOINT_FILE, CONFIG_FILE, RECORD_FILE, SETTINGS_FILE
from litgpt_moe.checkpoints.reader import load_model, load_tokenizer, read_settings, read_state, weights_of
from litgpt_moe.checkpoints.state import tokens_seen
from litgpt_moe.config import MoEConfig, model_facts
from litgpt_moe.files import read_json

NEEDED = {
    CHECKPOINT_FILE: "the weights",
    CONFIG_FILE: "the model's shape",
    "tokenizer.json": "the tokenizer",
    "tokenizer_config.json": "its special tokens",
}
KEPT = {
    RECORD_FILE: "the digests of all files",
    SETTINGS_FILE: "the settings of the run",
    "generation_config.json": "its special tokens' ids",
}
COUNTERS = ("iter_num", "step_count")
SETTINGS = ("seed", "precision", "devices", "num_nodes", "tokenizer_dir", "data_dir", "dataset_dir")


def describe(folder: Path, with_tensors: bool) -> dict[str, list[str]]:
    """Return title -> lines for the model, its training, the settings, the tokenizer and the tensors."""
    config = MoEConfig.from_file(folder / CONFIG_FILE)
    state = read_state(folder / CHECKPOINT_FILE)
    weights = weights_of(state, folder / CHECKPOINT_FILE)
    settings = read_settings(folder)
    given = [key for key in SETTINGS if settings.get(key) is not None]
    given += [key for key in ("train", "optimizer", "data") if settings.get(key)]
    tokenizer = "none"
    if (folder / "tokenizer.json").is_file():
        read = load_tokenizer(folder)
        tokenizer = f"{read.vocab_size} pieces, bos {read.bos_id}, eos {read.eos_id}"
    sections = {
        "model": _describe_model(config, weights),
        "training": _describe_progress(state if "model" in state else {}, settings, config.block_size),
        "settings": [f"  {key}: {settings[key]}" for key in given] or ["  none recorded"],
        "tokenizer": [f"  {tokenizer}"],
    }
    return sections | ({"tensors": _describe_tensors(weights)} if with_tensors else {})


def describe_files(folder: Path) -> list[str]:
    """Return a line with the size, or MISSING, for each expected or present file, and one about digests."""
    known = {**NEEDED, **KEPT}
    others = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name not in known)
    lines = []
    for name in [*known, *others]:
        path = folder / name
        state = f"{path.stat().st_size:>15,} bytes" if path.is_file() else f"{'MISSING':>21}"
        lines.append(f"  {name:<24}{state}  {known.get(name, '')}".rstrip())
    record = read_json(folder / RECORD_FILE)
    if not record:
        return [*lines, "no digests to verify (LitGPT's own checkpoints have none)"]
    recorded = f"as checkpoint.json recorded them at step {record.get('step')}"
    return [*lines, f"verified: {len(record['files'])} files are {recorded}"]


def _describe_model(config: MoEConfig, weights: dict[str, torch.Tensor]) -> list[str]:
    facts = model_facts(config)
    dtypes = ", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()}))
    experts = f"{config.n_expert} experts of width {config.moe_intermediate_size} in a MoE layer"
    return [
        f"  {config.name}: {config.n_layer} layers of width {config.n_embd}, {config.n_head} heads",
        f"  {experts}, {config.n_expert_per_token} per token" if config.n_expert else "  no experts",
        f"  context {config.block_size}, vocabulary {config.vocab_size} (padded {config.padded_vocab_size})",
        f"  {facts.total_params:,} parameters, {facts.active_params:,} active per token, in {dtypes}",
    ]


def _describe_progress(state: dict[str, Any], settings: dict[str, Any], block_size: int) -> list[str]:
    lines = [f"  {name} {state[name]:,}" for name in COUNTERS if isinstance(state.get(name), int)]
    if (tokens := tokens_seen(state, settings, block_size)) is not None:
        lines.append(f"  tokens seen {tokens:,}")
    extras = [key for key in state if key not in ("model", *COUNTERS)]
    carried = f"can be resumed, it also holds {', '.join(extras)}"
    return [*lines, f"  {carried if extras else 'weights only, cannot be resumed'}"]


def _describe_tensors(weights: dict[str, torch.Tensor]) -> list[str]:
    """Return a table: name, shape, dtype, mean, standard deviation and how many values are not finite."""
    width = max(map(len, weights), default=4)
    lines = [f"  {'name':<{width}} {'shape':>16} {'dtype':>9} {'mean':>11} {'std':>10}  not finite"]
    for name, weight in weights.items():
        values = weight.double()  # one tensor at a time: the file may be larger than the memory
        mean, std, bad = values.mean(), values.std(unbiased=False), int((~values.isfinite()).sum())
        shape, dtype = "x".join(map(str, weight.shape)), str(weight.dtype).removeprefix("torch.")
        lines.append(f"  {name:<{width}} {shape:>16} {dtype:>9} {mean:>11.3e} {std:>10.3e}  {bad or '-'}")
    return lines


def find_problems(folder: Path) -> list[str]:
    """Return one sentence for each thing that generate and evaluate need and that is missing."""
    problems = [f"{name} is missing ({why})" for name, why in NEEDED.items() if not (folder / name).is_file()]
    # on meta: compares names and shapes with the configuration, and takes no memory
    room = load_model(folder, device="meta").config.padded_vocab_size or 0
    if problems:
        return problems
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > room:
        problems.append(f"tokenizer has {tokenizer.vocab_size} pieces, the model {room}")
    if tokenizer.eos_id is None:
        problems.append("tokenizer_config.json names no eos_token, so generation never stops by itself")
    return problems
