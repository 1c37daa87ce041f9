"""From a checkpoint directory to a model: stock LitGPT's logits, every file checked, and no code run."""

import io
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
from conftest import TINY_CONFIG
from litgpt.config import Config
from litgpt.model import GPT, LLaMAMoE

from litgpt_moe.checkpoints.layout import write_record
from litgpt_moe.checkpoints.reader import (
    check_weights,
    checkpoint_flaw,
    load_model,
    load_tokenizer,
    read_state,
    read_training_state,
    read_weights,
    verify_checkpoint,
)
from litgpt_moe.checkpoints.state import RunState, rng_state
from litgpt_moe.config import MoEConfig

pytestmark = pytest.mark.usefixtures("eager")

MARKER = "executed"  # a folder that hostile files try to make


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny checkpoint, to damage, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "final"))


def one_sentence(error: BaseException) -> str:
    """The text of an error that a user sees."""
    text = str(error)
    assert text and "\n" not in text and len(text) < 700
    return text


# --- a whole checkpoint -------------------------------------------------------------------------------------


def test_a_loaded_checkpoint_gives_stock_litgpt_s_logits(tiny_checkpoint: Path) -> None:
    stock = GPT(Config.from_checkpoint(tiny_checkpoint))
    stock.load_state_dict(
        torch.load(tiny_checkpoint / "lit_model.pth", weights_only=True)["model"], strict=True
    )
    model = load_model(tiny_checkpoint)
    tokens = torch.randint(0, 512, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), stock(tokens), rtol=1e-5, atol=1e-6)
    assert isinstance(model.transformer.h[0].mlp, LLaMAMoE)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_a_model_is_loaded_in_the_dtype_asked_for(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.tensor([[1, 2, 3]])).dtype == torch.bfloat16


def test_a_model_on_the_meta_device_is_checked_by_names_and_shapes_alone(checkpoint: Path) -> None:
    assert all(p.is_meta for p in load_model(checkpoint, device="meta").parameters())
    weights = read_weights(checkpoint / "lit_model.pth")
    torch.save({name: w for name, w in weights.items() if name != "lm_head.weight"}, "bare.pth")
    shutil.move("bare.pth", checkpoint / "lit_model.pth")
    with pytest.raises(ValueError, match=r"they lack lm_head\.weight \(1 missing\)"):
        load_model(checkpoint, device="meta")


def test_bare_weights_as_litgpt_s_converters_write_them_are_read(checkpoint: Path) -> None:
    weights = {name: w.clone() for name, w in read_weights(checkpoint / "lit_model.pth").items()}
    torch.save(weights, checkpoint / "lit_model.pth")
    again = load_model(checkpoint).state_dict()
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in again)


def test_weights_that_are_not_finite_are_named(checkpoint: Path) -> None:
    state = torch.load(checkpoint / "lit_model.pth", weights_only=True)
    state["model"]["transformer.ln_f.weight"][3] = float("nan")
    torch.save(state, checkpoint / "lit_model.pth")
    with pytest.raises(
        ValueError, match=r"transformer\.ln_f\.weight holds values that are not finite"
    ) as caught:
        load_model(checkpoint)
    one_sentence(caught.value)


def test_weights_of_another_model_are_refused(checkpoint: Path) -> None:
    wider = {**TINY_CONFIG, "moe_intermediate_size": 12}
    (checkpoint / "model_config.yaml").write_text(yaml.dump(wider), encoding="utf-8")
    with pytest.raises(ValueError, match=r"do not fit the model config MoE-tiny: .*experts\.0\.fc_1\.weight"):
        load_model(checkpoint)


def test_weights_that_have_been_read_already_are_checked_without_the_file(checkpoint: Path) -> None:
    weights = read_weights(checkpoint / "lit_model.pth")
    (checkpoint / "lit_model.pth").unlink()
    config = MoEConfig.from_file(checkpoint / "model_config.yaml")
    assert check_weights(checkpoint, config, weights) is weights
    with pytest.raises(ValueError, match=r"they have an unexpected more \(1 too many\)"):
        check_weights(checkpoint, config, {**weights, "more": torch.zeros(1)})


def test_a_checkpoint_s_configuration_may_not_hold_yaml_aliases(checkpoint: Path) -> None:
    with (checkpoint / "model_config.yaml").open("a", encoding="utf-8") as file:
        file.write("n_shared_expert: &one 1\nfirst_k_dense_replace: *one\n")
    with pytest.raises(ValueError, match=r"model_config\.yaml is not readable YAML: it holds an alias"):
        load_model(checkpoint)


def test_the_tokenizer_is_the_one_in_the_folder(checkpoint: Path) -> None:
    assert load_tokenizer(checkpoint).bos_id == 1
    (checkpoint / "tokenizer.json").write_text('{"version": "1.0"}', encoding="utf-8")
    with pytest.raises(ValueError, match="its tokenizer files cannot be read"):
        load_tokenizer(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json; copy in the files"):
        load_tokenizer(checkpoint)


# --- damage -------------------------------------------------------------------------------------------------


def with_training_state(checkpoint: Path, step: int = 4) -> Path:
    """The checkpoint as a run of `step` steps leaves it: training state and record."""
    run = RunState(rng=rng_state()).state_dict()
    parts = {"optimizer": {"state": {}, "param_groups": []}, "train_dataloader": {}}
    model = torch.load(checkpoint / "lit_model.pth", weights_only=True)["model"]
    state = {"model": model, **parts, "iter_num": step, "step_count": step, **run}
    torch.save(state, checkpoint / "lit_model.pth")
    write_record(checkpoint, step, {})
    return checkpoint


def test_a_checkpoint_of_a_run_has_no_flaw_and_is_read_once(checkpoint: Path) -> None:
    with_training_state(checkpoint)
    assert checkpoint_flaw(checkpoint) is None
    assert read_training_state(checkpoint)["step_count"] == 4
    assert read_state(checkpoint / "lit_model.pth")["iter_num"] == 4


def test_a_flaw_is_told_without_the_folder_s_name_and_without_a_way_out(checkpoint: Path) -> None:
    assert checkpoint_flaw(checkpoint) == "holds weights alone; start from it with --initial_checkpoint_dir"
    with_training_state(checkpoint)
    data = bytearray((checkpoint / "lit_model.pth").read_bytes())
    data[len(data) // 2] ^= 1  # one bit, in the middle of a tensor: torch loads it without a word
    (checkpoint / "lit_model.pth").write_bytes(data)
    flaw = checkpoint_flaw(checkpoint)
    assert (
        flaw
        == "lit_model.pth is damaged or not a checkpoint's (its content is not what checkpoint.json recorded)"
    )
    (checkpoint / "model_config.yaml").unlink()
    assert checkpoint_flaw(checkpoint) == "it was not written to its end"


def test_a_checkpoint_named_after_another_step_has_a_flaw(checkpoint: Path) -> None:
    with_training_state(checkpoint, step=4).rename("step-00000008")
    flaw = checkpoint_flaw(Path("step-00000008"))
    assert flaw == "its training state is damaged: step_count is 4, and the checkpoint that of step 8"


def test_a_truncated_checkpoint_is_told_in_one_sentence(checkpoint: Path) -> None:
    weights = checkpoint / "lit_model.pth"
    weights.write_bytes(weights.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"lit_model\.pth is damaged") as caught:
        load_model(checkpoint)
    one_sentence(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "model_config.yaml"])
def test_a_file_that_changed_after_it_was_recorded_is_named(name: str, checkpoint: Path) -> None:
    write_record(checkpoint, 4, {})
    verify_checkpoint(checkpoint)
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[:-1] + b" ")
    with pytest.raises(
        ValueError, match=rf"{name} is damaged .*its content is not what checkpoint\.json recorded"
    ):
        verify_checkpoint(checkpoint)
    (checkpoint / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is damaged .*lists it and it is not there"):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["lit_model.pth", "model_config.yaml", "tokenizer.json", "notes.txt"])
def test_a_link_out_of_a_checkpoint_is_refused(name: str, checkpoint: Path) -> None:
    target = Path("elsewhere").resolve()
    target.write_bytes((checkpoint / name).read_bytes() if (checkpoint / name).exists() else b"")
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to(target)
    with pytest.raises(ValueError, match="is a link out of its folder; copy the file itself there"):
        load_model(checkpoint)


def test_no_file_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such checkpoint file"):
        read_state(tmp_path / "lit_model.pth")


# --- files made to do harm ----------------------------------------------------------------------------------


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
