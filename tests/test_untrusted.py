"""Files made to do harm: each is refused with one sentence by every script that reads it, and runs nothing."""

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from test_run_train import edit_yaml, workspace  # noqa: F401

import evaluate
import generate
import prepare_data
import run_train
import wandb_dataset
from tools import inspect_checkpoint

pytestmark = pytest.mark.usefixtures("eager", "workspace")

MARKER = "executed"  # a folder that hostile files try to make
TRAIN = ["--config", "train_config.yaml", "--model_config", "model_config.yaml"]
CHECKPOINT_READERS = {
    "generate": lambda folder: generate.main(["--ckpt_dir", folder, "--max_tokens", "1", "--prompt", "Tom"]),
    "evaluate": lambda folder: evaluate.main(["--ckpt_dir", folder, "--max_batches", "1", "--data_dir", "d"]),
    "inspect": lambda folder: inspect_checkpoint.main([folder, "--tensors"]),
    "initial": lambda folder: run_train.main([*TRAIN, "--initial_checkpoint_dir", folder]),
    "resume": lambda folder: run_train.main([*TRAIN, "--resume", folder]),
}


class Harm:
    """An object whose unpickling makes a folder."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (MARKER,)


def assert_refused(status: int, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """Exactly one sentence, no code run, nothing trained."""
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status in (1, 2) and len(errors) == 1, errors
    assert len(errors[0]) < 700
    for word in words:
        assert word in errors[0]
    assert not Path(MARKER).exists() and not Path("out").exists()


# --- weights ------------------------------------------------------------------------------------------------


def zipped(state: object) -> bytes:
    """The state as torch.save writes it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def rezipped(data: bytes, edit: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A checkpoint file whose parts `edit` has changed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(buffer, "w", method) as after:
        for name in before.namelist():
            after.writestr(name, edit(name, before.read(name)))
    return buffer.getvalue()


def with_pickle(data: bytes, edit: Callable[[bytes], bytes]) -> bytes:
    return rezipped(data, lambda name, part: edit(part) if name.endswith("data.pkl") else part)


def legacy(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def tarred(parts: dict[str, bytes]) -> bytes:
    """The format of torch before 0.1.10."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in parts.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def twice(good: bytes, harmful: bytes) -> bytes:
    """Two parts of one name: readers differ on which of them counts."""
    buffer = io.BytesIO(good)
    with zipfile.ZipFile(io.BytesIO(good)) as before, zipfile.ZipFile(buffer, "a") as after:
        (name,) = [name for name in before.namelist() if name.endswith("data.pkl")]
        with pytest.warns(UserWarning, match="Duplicate name"):
            after.writestr(name, harmful)
    return buffer.getvalue()


def renamed(data: bytes, old: str, new: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(buffer, "w") as after:
        for name in before.namelist():
            after.writestr(name.replace(old, new), before.read(name))
    return buffer.getvalue()


def calls(module: str, name: str, argument: int) -> bytes:
    """The pickle of what `module.name(argument)` returns."""
    number = b"\x8a\x08" + struct.pack("<q", argument)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + number + b"\x85R."


def nested_key(depth: int) -> bytes:
    """The pickle of {((((...),),),): None}."""
    return b"\x80\x02})" + b"\x85" * depth + b"Ns."


WEIGHTS: dict[str, Callable[[bytes], bytes]] = {
    "code in a zip": lambda good: zipped({"model": Harm()}),
    "code beside good weights": lambda good: zipped({**load(good), "rng": Harm()}),
    "code in a pickle of its own": lambda good: pickle.dumps({"model": Harm()}),
    "code in torch's old format": lambda good: legacy({"model": Harm()}),
    "good weights in torch's old format": lambda good: legacy(load(good)),
    "code in torch's oldest format": lambda good: tarred(
        {"sys_info": b"\x80\x02}.", "pickle": pickle.dumps(Harm()), "storages": b"", "tensors": b""}
    ),
    "a pickle with code before the zip": lambda good: pickle.dumps(Harm()) + good,
    "code as the second of two parts": lambda good: twice(good, pickle.dumps(Harm(), protocol=2)),
    "good weights as the second of two parts": lambda good: twice(zipped({"model": Harm()}), b"\x80\x02}."),
    "eval by another opcode": lambda good: with_pickle(
        good, lambda _: b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x03{}\n\x85R."
    ),
    "another function of torch": lambda good: with_pickle(good, lambda _: calls("torch", "empty", 10**13)),
    "memory by bytearray": lambda good: with_pickle(
        good, lambda _: calls("__builtin__", "bytearray", 10**13)
    ),
    "a million tuples in one another": lambda good: with_pickle(good, lambda _: nested_key(1_000_000)),
    "a hundred thousand lists in one another": lambda good: with_pickle(
        good, lambda _: b"\x80\x02" + b"](" * 100_000 + b"e" * 100_000 + b"."
    ),
    "a packed zip": lambda good: rezipped(good, lambda _, part: part, zipfile.ZIP_DEFLATED),
    "a zip bomb": lambda good: rezipped(good, lambda _, part: part + bytes(10**6), zipfile.ZIP_DEFLATED),
    "a zip in a zip": lambda good: renamed(rezipped(good, lambda _, part: good), "data.pkl", "inner.pth"),
    "parts that lie outside": lambda good: renamed(good, "lit_model/", "../../lit_model/"),
    "values that one number stands for": lambda good: zipped(
        {"model": {**load(good)["model"], "lm_head.weight": torch.zeros(1).expand(1 << 40)}}
    ),
    "a storage and its tensor said to be larger": lambda good: with_pickle(
        good, lambda data: larger_tensor(larger_storage(data))
    ),
    "a tensor said to be larger": lambda good: with_pickle(good, larger_tensor),
    "tensors kept nowhere": lambda good: zipped(
        {"model": {"lm_head.weight": torch.empty(10**6, device="meta")}}
    ),
    "a sparse tensor": lambda good: zipped(
        {"model": {"lm_head.weight": torch.sparse_coo_tensor([[0], [0]], [1.0], (10**6, 10**6))}}
    ),
    "text in place of tensors": lambda good: zipped(
        {"model": dict.fromkeys(load(good)["model"], "x" * 10**5)}
    ),
    "half of the file": lambda good: good[: len(good) // 2],
    "no byte": lambda good: b"",
}


def load(data: bytes) -> dict:
    return torch.load(io.BytesIO(data), weights_only=True)


def larger_storage(data: bytes) -> bytes:
    """The pickle with the number of values of its first storage changed to 2**31 - 1."""
    at = data.index(b"cpu") + 3
    at = data.index(b"K", at) if data[at : at + 1] not in (b"q", b"r") else at + 2
    kind = data[at : at + 1]
    width = {b"K": 1, b"M": 2, b"J": 4}[kind]
    return data[:at] + b"J" + struct.pack("<i", 2**31 - 1) + data[at + 1 + width :]


def larger_tensor(data: bytes) -> bytes:
    """The pickle with the length of its first tensor (512 x 16, BININT2 512) changed to 60,000."""
    return data.replace(b"M" + struct.pack("<H", 512), b"M" + struct.pack("<H", 60_000))


@pytest.fixture
def checkpoint(workspace: Path, tiny_checkpoint: Path, tiny_data: Path) -> Path:  # noqa: F811
    """A checkpoint to spoil, with the data that it was made for in `d`."""
    shutil.copytree(tiny_checkpoint, "checkpoint")
    shutil.copy("train_config.yaml", "checkpoint")
    shutil.copytree(tiny_data, "d")
    return Path("checkpoint")


@pytest.mark.parametrize("reader", CHECKPOINT_READERS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_made_to_do_harm_are_refused(
    checkpoint: Path, name: str, reader: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / "lit_model.pth"
    path.write_bytes(WEIGHTS[name](path.read_bytes()))
    assert_refused(CHECKPOINT_READERS[reader](str(checkpoint)), capsys, "checkpoint")
