"""From a checkpoint directory to a model: every file is checked against the record, and no code is run.

A foreign checkpoint cannot run code: its tensors are read with torch's `weights_only=True`, its YAML with
a safe loader without aliases, and everything else is JSON.
"""

import errno
import os
import pickle
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer

from litgpt_moe.balance import BIAS_NAME, has_selection_bias, layers_of, use_selection_bias
from litgpt_moe.checkpoints.layout import (
    CHECKPOINT_FILE,
    CONFIG_FILE,
    RECORD_FILE,
    SETTINGS_FILE,
    recorded_files,
    refuse_damage,
)
from litgpt_moe.checkpoints.read_errors import ReadFailed, is_read_error, patient
from litgpt_moe.checkpoints.state import check_state, damage_in, non_finite, tensor_bytes, tensors_of
from litgpt_moe.checkpoints.state_file import is_as_recorded
from litgpt_moe.config import MoEConfig
from litgpt_moe.files import is_outside, path_of_any_system, read_json
from litgpt_moe.hardware import DTYPES
from litgpt_moe.kernels.matmul import use_fast_linear
from litgpt_moe.processes import note_once
from litgpt_moe.yaml_files import read_mapping

MAX_PICKLE_BYTES = 4 << 20  # for data.pkl, the list of tensors; 400M parameters with AdamW need 0.4 MB


@patient
def verify_checkpoint(folder: Path, weights_only: bool = False) -> None:
    """Raise ValueError if a file differs from its record, or is a link out of the folder.

    `weights_only`: of lit_model.pth read only what the weights need, where the record has a digest of that.
    """
    for path in folder.iterdir():
        if path.is_symlink() and is_outside(path, folder):
            raise ValueError(f"{path} is a link out of its folder; copy the file itself there")
    for path, entry in recorded_files(folder).items():
        if not is_as_recorded(path, entry, weights_only):
            refuse_damage(path, f"its content is not what {RECORD_FILE} recorded")


def checkpoint_flaw(folder: Path) -> str | None:
    """Return why a checkpoint cannot be resumed, without its name; None if it can be."""
    try:
        read_training_state(folder)
    except ReadFailed:
        raise
    except (ValueError, OSError) as error:
        return flaw_words(error, folder)
    return None


def flaw_words(error: Exception, folder: Path) -> str:
    """Return an error message of `read_training_state` without its folder and its advice."""
    reason = str(error).removeprefix(str(folder)).lstrip(f": {os.sep}")
    return re.split("; (?:use|resume from) an", reason)[0]


def read_training_state(folder: Path) -> dict[str, Any]:
    """Return the training state in a checkpoint after a check of every file."""
    # LitGPT's own checkpoints have no digests; it writes the configuration last
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder}: it was not written to its end; use another checkpoint")
    verify_checkpoint(folder)
    state = read_state(folder / CHECKPOINT_FILE)
    check_state(state, folder)
    check_finite(state, folder / CHECKPOINT_FILE)
    return state


@patient
def read_state(path: Path) -> dict[str, Any]:
    """Return the content of lit_model.pth, its tensors memory-mapped; runs no code (`weights_only`)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    try:
        _check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if odd := next((name for name, tensor in tensors_of(state) if not _is_plain(tensor)), None):
            raise ValueError(f"its {odd:.80} is no plain tensor")
        # a small storage can be expanded to any size; factor 2: tied weights share one storage
        if tensor_bytes(state) > 2 * path.stat().st_size:
            raise ValueError("its tensors claim more values than it holds")
    # a damaged file raises pickle, zip, runtime, key, memory or OS errors (a seek too far)
    except Exception as error:
        # weights as recorded are not damaged, so memory is what lacks
        is_memory = isinstance(error, MemoryError) and (path.parent / RECORD_FILE).exists()
        if is_memory or is_read_error(error):
            number = getattr(error, "errno", None) or errno.ENOMEM
            raise OSError(number, os.strerror(number), str(path)) from error
        if isinstance(error, OSError) and error.filename:
            raise
        reason = _reason(error)
        raise ValueError(f"{path} is damaged or not a checkpoint ({reason}); use another one") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds no checkpoint; give one that run_train.py or LitGPT wrote")
    return dict(dict.items(state))  # attributes of an OrderedDict may shadow its methods


def _is_plain(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has values (on `meta` it has none), in rows and columns."""
    is_dense = tensor.layout == torch.strided and not tensor.is_nested
    return is_dense and not tensor.is_meta and not tensor.is_quantized


def _reason(error: Exception) -> str:
    text = str(error).strip()
    if isinstance(error, pickle.UnpicklingError):  # torch's message explains how to load it anyway
        if name := re.search(r"GLOBAL ([\w.]{1,60})", text):
            return f"it asks for {name[1]}, which weights do not need and which may do harm"
        return "it holds more than tensors and plain values"
    return (text.splitlines() or [type(error).__name__])[0][:120]


def _check_archive(path: Path) -> None:
    """Raise ValueError unless the file is a zip archive as torch.save writes it."""
    with zipfile.ZipFile(path) as archive:
        if len({entry.filename for entry in archive.infolist()}) < len(archive.infolist()):
            raise ValueError("two of its parts have one name")
        for entry in archive.infolist():
            name = entry.filename
            if ".." in re.split(r"[/\\]", name) or name.startswith(("/", "\\")):
                raise ValueError(f"its part {name!r} would lie outside")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > path.stat().st_size:
                raise ValueError(f"its part {name!r} unpacks to {entry.file_size:,} bytes")
            if name.endswith(("data.pkl", "byteorder", "version")) and entry.file_size > MAX_PICKLE_BYTES:
                raise ValueError(f"its part {name!r} has {entry.file_size:,} bytes")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the model's state dict in lit_model.pth, memory-mapped."""
    return weights_of(read_state(path), path)


def weights_of(state: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    """Return the model's state dict in `state`, the content of `path`; ValueError if it has none."""
    weights = state.get("model", state)
    if isinstance(weights, dict) and all(
        isinstance(name, str) and isinstance(weight, torch.Tensor) for name, weight in dict.items(weights)
    ):
        return dict(dict.items(weights))
    raise ValueError(f"{path} holds no model weights; give a checkpoint that run_train.py or LitGPT wrote")


def check_weights(folder: Path, model: GPT, weights: dict[str, torch.Tensor]) -> None:
    """Raise ValueError unless `weights`, from `folder`, fit the model, which takes over a selection bias."""
    if has_selection_bias(weights):
        use_selection_bias(model)
    expected = model.state_dict()
    where = f"{folder}: the weights do not fit the model config {model.config.name}:"
    if missing := [name for name in expected if name not in weights]:
        raise ValueError(f"{where} they lack {missing[0]} ({len(missing)} missing)")
    if extra := [name for name in weights if name not in expected]:
        raise ValueError(f"{where} they have an unexpected {extra[0]!s:.80} ({len(extra)} too many)")
    for name, tensor in expected.items():
        shape, dtype = weights[name].shape, weights[name].dtype
        if shape != tensor.shape:
            raise ValueError(f"{where} {name} is {tuple(shape)}, the config wants {tuple(tensor.shape)}")
        if dtype not in (*DTYPES.values(), torch.float64):
            raise ValueError(f"{where} {name} is of {dtype}, not of float32, bfloat16 or float16")


def check_finite(state: dict[str, Any], path: Path) -> None:
    """Raise ValueError, naming the first, if a weight or moment holds an infinity or NaN."""
    with damage_in(path.parent):  # torch cannot add values of every dtype
        name = non_finite(state)
    if name:
        text = f"{path}: {name.removeprefix('model.')} holds values that are not finite"
        raise ValueError(f"{text} (the training diverged); use an earlier checkpoint")


def load_model(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> GPT:
    """Return the checkpoint's model in eval mode on `device`, in `dtype` (default: as saved).

    The optimizer state is not read into memory. On the device `meta` only names and shapes are checked.
    """
    # to verify a gigabyte takes as long as to copy it: both at once
    with ThreadPoolExecutor(2, "load") as other:
        verified = other.submit(verify_checkpoint, folder, weights_only=True)
        try:
            model = _read_model(folder, device, dtype, other)
        except (ValueError, OSError):
            verified.result()  # that a file is damaged says more than what came of it
            raise
        verified.result()
    return model


def _read_model(
    folder: Path, device: torch.device | str, dtype: torch.dtype | None, other: ThreadPoolExecutor
) -> GPT:
    config, model = MoEConfig.model_from_file(folder / CONFIG_FILE, is_foreign=True)
    weights = read_weights(folder / CHECKPOINT_FILE)
    check_weights(folder, model, weights)
    names = [*weights]

    def copies(names: list[str]) -> dict[str, torch.Tensor]:
        # the selection bias stays float32 in every dtype, so that the same experts are chosen as in training;
        # copy: a run that is still training may replace the memory-mapped file
        dtypes = {name: torch.float32 if name.endswith(BIAS_NAME) else dtype for name in names}
        return {name: weights[name].to(device, dtypes[name], copy=True) for name in names}

    half = other.submit(copies, names[::2])
    checked = {} if torch.device(device).type == "meta" else weights
    finite = other.submit(check_finite, {"model": checked}, folder / CHECKPOINT_FILE)
    # nothing but the copies is kept: a mapped file cannot be replaced on Windows, and this frame stays until
    # the next garbage collection: jsonargparse's exceptions, in a cycle, hold the frames of all its callers
    weights, checked = copies(names[1::2]) | half.result(), None
    finite.result()
    model.load_state_dict(weights, assign=True)
    use_fast_linear(model)
    model.cos, model.sin = model.rope_cache(device=torch.device(device))
    for layer in layers_of(model).values():
        layer.tokens_per_expert = torch.zeros(config.n_expert, dtype=torch.int64, device=device)
        if not layer.has_selection_bias:  # not in the weights, so still on meta
            layer.e_score_correction_bias = torch.zeros(config.n_expert, device=device)
    return model.requires_grad_(False).eval()


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings that a checkpoint was trained with, {} if it has none."""
    path = folder / SETTINGS_FILE
    return read_mapping(path, is_foreign=True) if path.is_file() else {}


def trained_on(settings: dict[str, Any]) -> Path | None:
    """Return the data directory in the settings of a checkpoint; None without one, or for a network share."""
    data: Any = settings.get("data")
    given = data.get("init_args") if isinstance(data, dict) else None
    train = given.get("train_data_path") if isinstance(given, dict) else None
    # its name in earlier versions is dataset_dir
    named = settings.get("data_dir") or settings.get("dataset_dir")
    if not isinstance(name := named if isinstance(named, str) else train, str):
        return None
    if (path := path_of_any_system(name)) is None:
        note_once(
            f"{name}, where its data were, is a network share: it is read only where --data_dir names it."
        )
        return None
    return path if name is named else path.parent


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the checkpoint's tokenizer; ValueError if it is damaged, FileNotFoundError if it is missing."""
    way_out = "copy in the files of the tokenizer it was trained with"
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} holds no tokenizer.json; {way_out}")
    config = read_json(folder / "tokenizer_config.json")
    try:
        tokenizer = Tokenizer.__new__(Tokenizer)
        try:
            tokenizer.__init__(folder)
        except (KeyError, TypeError):
            # litgpt 0.5.13 reads tokenizer_class for this as the last thing, and GPT-2's folder has none
            if not hasattr(tokenizer, "apply_decoding_fix"):
                raise
    # tokenizers raises plain Exception, LitGPT among others KeyError
    except Exception as error:
        raise ValueError(f"{folder}: its tokenizer files cannot be read ({error}); {way_out}") from error
    processor_of(tokenizer).no_truncation()  # which would cut a text
    processor_of(tokenizer).no_padding()
    for name in ("bos", "eos"):
        number = getattr(tokenizer, f"{name}_id")
        is_none = number is None and config.get(f"{name}_token") is None
        if not is_none and not _is_piece(tokenizer, number):
            raise ValueError(f"{folder}: the tokenizer's {name}_id {number!r:.80} is no id; {way_out}")
    if tokenizer.use_bos and tokenizer.bos_id is None:
        raise ValueError(f"{folder}: the tokenizer adds BOS (add_bos_token) but has none; {way_out}")
    return tokenizer


def processor_of(tokenizer: Tokenizer) -> Any:
    """Return the tokenizers library's tokenizer in LitGPT's (in other folders it is sentencepiece's)."""
    return tokenizer.processor


def _is_piece(tokenizer: Tokenizer, number: Any) -> bool:
    if type(number) is not int or not 0 <= number < 2**31:
        return False
    return processor_of(tokenizer).id_to_token(number) is not None
