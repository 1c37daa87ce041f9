"""Checkpoint files made to do harm: each is refused with one sentence, and none of them runs code."""

import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.errors import one_sentence

from litgpt_moe.checkpoints.reader import checkpoint_flaw, load_model, read_state

pytestmark = pytest.mark.usefixtures("eager")

MARKER = "executed"  # a folder that hostile files try to make


class Harm:
    """An object whose unpickling makes a folder."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (MARKER,)


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
        {
            "model": {
                "lm_head.weight": torch.sparse_coo_tensor(torch.zeros(2, 1), torch.ones(1), (10**6, 10**6))
            }
        }
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


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_made_to_do_harm_are_refused(checkpoint: Path, name: str) -> None:
    path = checkpoint / "lit_model.pth"
    path.write_bytes(WEIGHTS[name](path.read_bytes()))
    with pytest.raises(ValueError, match="checkpoint") as caught:
        load_model(checkpoint)
    assert "lit_model.pth" in one_sentence(caught.value)
    assert checkpoint_flaw(checkpoint) is not None
    assert not Path(MARKER).exists()


def test_harm_is_done_where_torch_is_told_to_load_anything(checkpoint: Path) -> None:
    """The presence beside the absence above: these files do run code."""
    torch.load(io.BytesIO(zipped({"model": Harm()})), weights_only=False)
    assert Path(MARKER).exists()


def test_what_torch_refuses_is_named(checkpoint: Path) -> None:
    path = checkpoint / "lit_model.pth"
    path.write_bytes(WEIGHTS["another function of torch"](path.read_bytes()))
    with pytest.raises(ValueError, match=r"\(it asks for torch\.empty, which weights do not need"):
        read_state(path)


def test_a_part_that_describes_too_much_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "lit_model.pth"
    path.write_bytes(with_pickle(path.read_bytes(), lambda data: data + bytes(5 << 20)))
    with pytest.raises(ValueError, match=r"its part 'lit_model/data\.pkl' has 5,24"):
        read_state(path)
