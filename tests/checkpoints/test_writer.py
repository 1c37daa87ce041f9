"""Checkpoints that are whole or not there: what is written, kept, put back, and what a full disk does."""

import hashlib
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from conftest import TINY_CONFIG
from lightning.fabric import Fabric
from litgpt.model import GPT

from litgpt_moe.checkpoints import writer
from litgpt_moe.checkpoints.layout import CheckpointArgs, read_record, step_name
from litgpt_moe.checkpoints.reader import checkpoint_flaw, load_model, load_tokenizer, read_state
from litgpt_moe.checkpoints.state import RunState, rng_state
from litgpt_moe.checkpoints.writer import (
    CheckpointWriter,
    write_state,
)
from litgpt_moe.config import MoEConfig

pytestmark = pytest.mark.usefixtures("eager")


class FakeFabric:
    """What a writer needs of Fabric on one device: its strategy hands over the whole state."""

    global_rank = 0

    def __init__(self, writer: CheckpointWriter) -> None:
        self.writer = writer

    def save(self, path: Path, state: dict[str, Any]) -> None:
        self.writer.hold({**state, "model": state["model"].state_dict()})


class Run:
    """A run that saves: a model, a writer for `out`, and what it said."""

    def __init__(self, tokenizer_dir: Path, out: Path = Path("out"), **args: Any) -> None:
        self.model, self.tokenizer_dir, self.out = GPT(MoEConfig(**TINY_CONFIG)), tokenizer_dir, out
        self.told: list[str] = []
        self.writer = CheckpointWriter(out, CheckpointArgs(**args), "seed: 3\n", self.told.append)

    def save(self, step: int, name: str = "") -> Path:
        """Save the state of a step and wait until it is written."""
        run = RunState(rng=rng_state()).state_dict()
        groups = [{"params": list(range(len(self.model.state_dict())))}]
        parts = {"optimizer": {"state": {}, "param_groups": groups}, "train_dataloader": {}}
        state = {"model": self.model, **parts, "iter_num": step, "step_count": step, **run}
        target = self.out / (name or step_name(step))
        self.writer.save(
            cast(Fabric, FakeFabric(self.writer)), state, self.tokenizer_dir, target / "lit_model.pth"
        )
        return target


@pytest.fixture
def run(tmp_path: Path, tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """A function that begins a run in an empty working directory; its options are those of `Run`."""
    monkeypatch.chdir(tmp_path)
    return lambda **options: Run(**{"tokenizer_dir": tiny_tokenizer_dir, **options})


def names(folder: str = "out") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


# --- what is written ----------------------------------------------------------------------------------------


def test_a_saved_checkpoint_is_whole_and_loads(run: Callable[..., Run]) -> None:
    one = run()
    target = one.save(4)
    one.writer.wait()
    assert one.told == [f"Saved {target}"] and one.writer.failure is None and one.writer.lasting_s > 0
    assert checkpoint_flaw(target) is None
    assert names(str(target)) == [
        "checkpoint.json",
        "generation_config.json",
        "lit_model.pth",
        "model_config.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
        "train_config.yaml",
    ]
    assert (target / "train_config.yaml").read_text(encoding="utf-8") == "seed: 3\n"
    weights, saved = load_model(target).state_dict(), one.model.state_dict()
    assert all(torch.equal(weights[name], saved[name]) for name in saved)
    assert load_tokenizer(target).eos_id == 2


def test_the_digests_are_those_of_the_files(run: Callable[..., Run]) -> None:
    one = run()
    target = one.save(1, "final")
    one.writer.wait()
    record = read_record(target)
    assert set(record["files"]) == {*names(str(target))} - {"checkpoint.json"} and record["step"] == 1
    assert "selection_bias" not in record
    for name, entry in record["files"].items():
        data = (target / name).read_bytes()
        entry.pop("weights", None)  # test_reader.py
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_a_selection_bias_is_noted_in_the_record(run: Callable[..., Run]) -> None:
    one = run()
    one.writer.notes["selection_bias"] = True
    target = one.save(1)
    one.writer.wait()
    assert read_record(target)["selection_bias"] is True


def test_files_of_a_tokenizer_folder_that_belong_to_another_model_stay_out(
    run: Callable[..., Run], tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_tokenizer_dir, tmp_path / "other"))
    (folder / "model_config.yaml").write_text(yaml.dump({**TINY_CONFIG, "n_embd": 32}), encoding="utf-8")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "checkpoint.json").write_text("{}", encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")  # which LitGPT's Tokenizer reads too
    one = run(tokenizer_dir=folder)
    target = one.save(4)
    one.writer.wait()
    assert MoEConfig.from_file(target / "model_config.yaml").n_embd == TINY_CONFIG["n_embd"]
    assert not (target / "config.json").exists()
    assert (target / "tokenizer.model").read_bytes() == b"sentencepiece"
    assert checkpoint_flaw(target) is None


def test_every_checkpoint_holds_the_tokenizer_that_the_run_began_with(
    run: Callable[..., Run], tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_tokenizer_dir, tmp_path / "tokenizer"))
    one = run(tokenizer_dir=folder)
    first = one.save(4)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")  # another command trains a new one there
    second = one.save(8)
    one.writer.wait()
    contents = {(path / "tokenizer.json").read_bytes() for path in (first, second)}
    assert contents == {(tiny_tokenizer_dir / "tokenizer.json").read_bytes()}


def test_training_waits_for_the_copy_alone_and_the_copy_does_not_change_with_the_weights(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, goes_on = run(), threading.Event()

    def write(state: dict[str, Any], path: Path) -> dict[str, Any]:
        assert goes_on.wait(timeout=60)
        return write_state(state, path)

    monkeypatch.setattr(writer, "write_state", write)
    before = {name: weight.clone() for name, weight in one.model.state_dict().items()}
    target = one.save(4)
    with torch.no_grad():
        for weight in one.model.parameters():  # a step, while the file is not there yet
            weight.add_(1)
    assert not target.exists()
    goes_on.set()
    one.writer.wait()
    saved = read_state(target / "lit_model.pth")["model"]
    assert all(torch.equal(saved[name], before[name]) for name in before)


def test_tied_weights_are_written_once_and_stay_tied(run: Callable[..., Run]) -> None:
    one = run()
    one.model.get_submodule("transformer.wte").weight = one.model.lm_head.weight
    target = one.save(4)
    one.writer.wait()
    saved = read_state(target / "lit_model.pth")["model"]
    assert saved["transformer.wte.weight"].data_ptr() == saved["lm_head.weight"].data_ptr()


def test_whoever_asks_is_told_of_each_checkpoint(run: Callable[..., Run]) -> None:
    one, saved = run(), []
    one.writer.on_saved = lambda folder, step: saved.append((folder.name, step))
    one.save(4)
    one.save(8, "final")
    one.writer.wait()
    assert saved == [("step-00000004", 4), ("final", 8)]


def test_weights_that_are_no_numbers_are_not_saved(run: Callable[..., Run]) -> None:
    one = run()
    with torch.no_grad():
        one.model.lm_head.weight[0, 0] = float("inf")
    target = one.save(4)
    one.writer.wait()
    reason = "model.lm_head.weight holds values that are no numbers"
    assert one.writer.failure == f"{target} could not be saved: {reason}"
    # they will not be numbers again
    assert one.told == [f"Warning: {one.writer.failure}"]
    assert names() == []


def test_what_fails_after_a_save_does_not_make_it_a_failed_one(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run(keep_last=1)

    def prune() -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(one.writer, "_prune", prune)
    target = one.save(4)
    one.writer.wait()
    assert one.writer.failure is None and one.told == [f"Saved {target}"]


def test_a_save_without_memory_is_told(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def write(state: dict[str, Any], path: Path) -> dict[str, Any]:
        raise MemoryError

    monkeypatch.setattr(writer, "write_state", write)
    one = run()
    target = one.save(4)
    one.writer.wait()
    assert one.told == [f"Warning: {target} could not be saved: MemoryError; training goes on"]
    assert names() == []


# --- which checkpoints stay ---------------------------------------------------------------------------------


def test_old_checkpoints_are_deleted_but_for_those_to_keep(run: Callable[..., Run]) -> None:
    one = run(keep_last=2, keep_every=3)
    for step in range(1, 9):
        one.save(step)
    one.save(8, "final")
    one.writer.wait()
    assert names() == ["final", *map(step_name, (3, 6, 7, 8))]


def test_a_folder_of_somebody_s_own_neither_counts_nor_goes(run: Callable[..., Run]) -> None:
    Path("out/step-best").mkdir(parents=True)
    one = run(keep_last=1)
    for step in (1, 2):
        one.save(step)
    one.writer.wait()
    assert names() == ["step-00000002", "step-best"]


def test_steps_of_nine_digits_are_the_newest(run: Callable[..., Run]) -> None:
    one = run(keep_last=1)
    for step in (99_999_999, 100_000_000):
        one.save(step)
    one.writer.wait()
    assert names() == ["step-100000000"]


# --- a full disk --------------------------------------------------------------------------------------------


def test_a_full_disk_lets_training_go_on_and_the_next_save_succeed(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, usage = run(), shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    target = one.save(4)
    one.writer.wait()
    (told,) = one.told
    assert re.fullmatch(
        rf"Warning: {re.escape(str(target))} could not be saved: it needs 1,\d{{3}},\d{{3}} bytes "
        r"but 1,000 were free; make room on that disk; training goes on",
        told,
    )
    assert names() == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    one.save(8)
    one.writer.wait()
    assert one.writer.failure is None and names() == ["step-00000008"]


@pytest.mark.parametrize(("on_full_disk", "is_last"), [("stop", False), ("continue", True)])
def test_where_the_run_ends_with_a_full_disk_it_is_not_said_that_training_goes_on(
    on_full_disk: str, is_last: bool, run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, usage = run(on_full_disk=on_full_disk), shutil.disk_usage(".")
    one.writer.is_last = is_last
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    one.save(4)
    one.writer.wait()
    assert one.told[0].endswith("make room on that disk")


def test_a_disk_that_fills_up_while_torch_writes_is_told_as_such(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("the device that is always full, /dev/full, is Linux's")
    with pytest.raises(OSError, match="No space left"):  # not torch's "unexpected pos"
        write_state({"model": {"weight": torch.zeros(10**6)}}, Path("/dev/full"))


def test_a_disk_without_inodes_is_told_as_such(run: Callable[..., Run], small_disk: Path) -> None:
    limit = ["mount", "-o", "remount,nr_inodes=4", str(small_disk)]
    if subprocess.run(limit, capture_output=True).returncode:
        pytest.skip("this kernel's tmpfs has no limit of inodes to set")
    one = run(out=small_disk / "out")
    for n in range(2):
        (small_disk / f"file {n}").touch()
    one.save(4)
    one.writer.wait()
    assert re.search(
        r"step-00000004 could not be saved: no inode is free on that disk, though .*;", one.told[0]
    )


def test_a_disk_that_fills_up_while_the_weights_are_written_leaves_the_earlier_checkpoints_whole(
    run: Callable[..., Run], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filler, out = small_disk / "filler", small_disk / "out"

    def write(state: dict[str, Any], path: Path) -> dict[str, Any]:
        if path.parent.name.startswith(
            ".step-00000008."
        ):  # another process takes the room after it was looked for
            filler.write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - 50_000))
        return write_state(state, path)

    monkeypatch.setattr(writer, "write_state", write)
    one = run(out=out)
    for step in (4, 8):
        one.save(step)
    one.writer.wait()
    sentence = r"step-00000008 could not be saved: it needs (\S+) bytes but (\S+) were free"
    told = re.search(sentence, one.told[-1])
    assert told
    needed, free = (int(number.replace(",", "")) for number in told.groups())
    assert 0 < free < needed
    filler.unlink()
    one.save(12)
    one.writer.wait()
    assert names(str(out)) == ["step-00000004", "step-00000012"]
    assert all(checkpoint_flaw(path) is None for path in out.iterdir())
