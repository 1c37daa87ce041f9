"""The mean of several checkpoints' weights: of one run's last ones it is often better than any of them.

Polyak averaging over the end of training (Izmailov et al. 2018, arxiv.org/abs/1803.05407; for the stable part
of warmup-stable-decay, Haegele et al. 2024, arxiv.org/abs/2405.18392). Weights of different runs have no
common mean: the same function has its neurons, and experts, in another order.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from litgpt_moe.balance import has_selection_bias
from litgpt_moe.checkpoints.layout import (
    CHECKPOINT_FILE,
    CONFIG_FILE,
    FINAL,
    SETTINGS_FILE,
    find_checkpoint,
    is_checkpoint,
    read_files,
    read_record,
    step_of,
    steps_of,
)
from litgpt_moe.checkpoints.reader import check_finite, check_weights, read_weights, verify_checkpoint
from litgpt_moe.checkpoints.tokenizer_files import read_tokenizer_files, tokenizer_sha256
from litgpt_moe.checkpoints.writer import foreign_files, write_checkpoint
from litgpt_moe.config import MoEConfig
from litgpt_moe.files import free_name, remove
from litgpt_moe.folders import put_in_place

# entry of an average's checkpoint.json: the checkpoints that it is made of
MADE_OF = "averaged"


def last_of(run: Path, count: int) -> list[Path]:
    """Return the last `count` checkpoints of a run, the earliest first; ValueError if it has fewer."""
    steps = {step: path for step, path in steps_of(run).items() if (path / CONFIG_FILE).is_file()}
    if is_checkpoint(run / FINAL) and (step := step_of(run / FINAL)) is not None:
        steps.setdefault(step, run / FINAL)  # usually the last step-* again
    if len(steps) < count:
        have = f"{len(steps)} checkpoints of different steps"
        raise ValueError(f"{run}: holds {have}, --last is {count}; train with a smaller train.save_interval")
    return [steps[step] for step in sorted(steps)[-count:]]


def check_out(out: Path, overwrite: bool) -> bool:
    """Return whether `out` is an earlier average to replace; FileExistsError if anything else is there."""
    if not out.is_dir() or not any(out.iterdir()):
        return False
    if not is_checkpoint(out) or MADE_OF not in read_record(out):
        raise FileExistsError(f"{out} is not empty, nor an average; name a folder that does not exist yet")
    if not overwrite:
        raise FileExistsError(f"{out} holds an average already; add --overwrite or name another folder")
    return True


def open_all(places: list[Path]) -> tuple[list[Path], MoEConfig, list[dict[str, torch.Tensor]]]:
    """Return the checkpoints' folders, their configuration, and their weights, memory-mapped.

    ValueError unless all are undamaged and of one model with one tokenizer.
    """
    folders = [find_checkpoint(place) for place in places]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("a checkpoint is named twice; each counts once, so name it once")
    if len(folders) < 2:
        raise ValueError(f"{folders[0]} is one checkpoint; name two or more, or a run with --last 4")
    config, model = MoEConfig.model_from_file(folders[0] / CONFIG_FILE, is_foreign=True)
    all_weights = []
    for folder in folders:
        verify_checkpoint(folder)
        _check_same(folders[0], config, folder)
        weights = read_weights(folder / CHECKPOINT_FILE)
        if all_weights and has_selection_bias(weights) != has_selection_bias(all_weights[0]):
            one_of = f"only one of {folders[0]} and {folder} was trained with a selection bias"
            raise ValueError(f"{one_of}; average checkpoints of one run")
        check_weights(folder, model, weights)
        check_finite({"model": weights}, folder / CHECKPOINT_FILE)
        all_weights.append(weights)
    return folders, config, all_weights


def _check_same(first: Path, config: MoEConfig, folder: Path) -> None:
    """Raise ValueError unless the checkpoint in `folder` has the first one's configuration and tokenizer."""
    ours, theirs = asdict(config), asdict(MoEConfig.untried_from_file(folder / CONFIG_FILE, is_foreign=True))
    for key in ours:
        if ours[key] != theirs[key] and key not in ("name", "hf_config"):
            differ = f"{key} is {theirs[key]}, in {first} it is {ours[key]}"
            raise ValueError(f"{folder}: {differ}; average checkpoints of one run")
    texts = [read_tokenizer_files(place).get("tokenizer.json", b"") for place in (first, folder)]
    if tokenizer_sha256(texts[0]) != tokenizer_sha256(texts[1]):
        raise ValueError(f"{folder}: its tokenizer is not that of {first}; average checkpoints of one run")


def mean(all_weights: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean of each weight, added up in float32 or wider, in the first one's dtype."""
    means: dict[str, torch.Tensor] = {}
    by_place: dict[tuple[int, torch.Size], torch.Tensor] = {}
    for name, first in tqdm(all_weights[0].items(), unit=" weights", disable=None):
        # tied weights are one tensor under two names, and stay tied
        place = (first.data_ptr(), first.shape)
        if place not in by_place:
            exact = torch.promote_types(first.dtype, torch.float32)
            total = torch.zeros(first.shape, dtype=exact)
            for weights in all_weights:
                total += weights[name]
            by_place[place] = total.div_(len(all_weights)).to(first.dtype)
        means[name] = by_place[place]
    return means


def average(places: list[Path], out: Path, overwrite: bool = False) -> list[Path]:
    """Write the mean of checkpoints to the folder `out` and return their folders."""
    is_replacing = check_out(out, overwrite)
    folders, config, all_weights = open_all(places)
    if out.resolve() in [folder.resolve() for folder in folders]:
        raise ValueError(f"{out} is one of the checkpoints to average; name another folder")
    notes: dict[str, Any] = {MADE_OF: [_identity(folder) for folder in folders]}
    if has_selection_bias(all_weights[0]):
        notes["selection_bias"] = True
    # of the latest: how it was trained, and on which data evaluate.py finds its validation split
    files = read_tokenizer_files(folders[-1]) | read_files(folders[-1], (SETTINGS_FILE,))
    target = free_name(out.absolute().with_name(f"{out.absolute().name}.new")) if is_replacing else out
    write_checkpoint(target, mean(all_weights), config, files, **notes)
    if is_replacing:
        try:
            put_in_place(target, out.absolute(), foreign_files)
        except OSError:
            remove(target)
            raise
    return folders


def _identity(folder: Path) -> dict[str, Any]:
    recorded = read_record(folder).get("files", {}).get(CHECKPOINT_FILE, {})
    return {"path": str(folder.absolute()), "step": step_of(folder), "sha256": recorded.get("sha256")}
