"""Checkpoints that are whole or not there: what is written, kept, passed over, and what a full disk does."""

import gc
import json
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.runs import BALANCED, assert_same_run, rows, run, weights

from litgpt_moe.checkpoints import writer
from litgpt_moe.checkpoints.layout import checkpoints_of
from litgpt_moe.checkpoints.reader import checkpoint_flaw
from litgpt_moe.training import summary
from litgpt_moe.training.hooks import LoopHooks

pytestmark = pytest.mark.usefixtures("eager", "workspace")


@pytest.mark.parametrize(
    "flags",
    [
        ("--train.tie_embeddings", "true"),  # the optimizer has a weight less
        ("--optimizer", "SGD"),  # without momentum it keeps nothing
    ],
)
def test_a_run_whose_optimizer_keeps_less_resumes_too(flags: tuple[str, ...]) -> None:
    assert run(*flags, "--out_dir", "whole") == 0
    shutil.copytree("whole", "out")
    for name in ("final", "step-00000008"):
        shutil.rmtree(f"out/{name}")
    assert run(*flags, "--resume", "auto") == 0
    assert_same_run("out", "whole")


def test_a_setting_of_the_optimizer_that_is_a_tensor_is_damage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    path = Path("out/final/lit_model.pth")
    state = torch.load(path, weights_only=True)
    state["optimizer"]["param_groups"][1]["fused"] = torch.ones(2)
    torch.save(state, path)
    Path("out/final/checkpoint.json").unlink()
    capsys.readouterr()
    assert run("--resume", "out/final", "--out_dir", "other") == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert error.replace("\\", "/").startswith("error: out/final: its training state is damaged: ")
    assert error.replace("\\", "/").endswith("start from its weights with --initial_checkpoint_dir out/final")
    assert [path for path in Path("other").iterdir() if path.name != "logs"] == []


def test_another_total_at_resume_is_told_in_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--max_tokens", 2100) == 0  # 8 steps of 256; 2,048 is no number that anybody gave
    shutil.rmtree("out/final")
    capsys.readouterr()
    assert run("--resume", "auto", "--max_tokens", 2100) == 0
    assert (
        "step-00000008 is at the last step of train.max_tokens; to train on, raise that"
        in capsys.readouterr().err
    )
    assert run("--max_tokens", 2400, "--resume", "auto") == 0
    error = capsys.readouterr().err.replace("\\", "/")
    assert "Warning: out/step-00000008 is of a run of 8 steps, now train.max_tokens makes it 9" in error
    assert "2,048" not in error


def test_old_checkpoints_are_deleted_but_for_those_to_keep() -> None:
    flags = ("--checkpoints.keep_last", 2, "--checkpoints.keep_every", 3, "--train.save_interval", 1)
    assert run(*flags) == 0
    assert sorted(path.name[-2:] for path in Path("out").glob("step-*")) == ["03", "06", "07", "08"]
    assert [path.name for path in Path("out").glob(".step*")] == []


def test_the_digests_are_those_of_the_files() -> None:
    import hashlib

    assert run("--max_tokens", 256) == 0
    described = json.loads(Path("out/final/checkpoint.json").read_text(encoding="utf-8"))
    files = {path.name for path in Path("out/final").iterdir()}
    assert set(described["files"]) == files - {"checkpoint.json"} and described["step"] == 1
    for name, entry in described["files"].items():
        data = Path("out/final", name).read_bytes()
        weights = entry.pop("weights", None)
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if name == "lit_model.pth":  # of each weight there are two moments too
            head, tail = data[: weights["head"]], data[-weights["tail"] :]
            assert len(head) < len(data) / 2
            assert weights["sha256"] == hashlib.sha256(head + tail).hexdigest()


def test_a_damaged_checkpoint_is_passed_over_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--out_dir", "whole") == 0
    assert run() == 0
    shutil.rmtree("out/final")
    path = Path("out/step-00000008/lit_model.pth")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # one bit, in the middle of a tensor: torch loads it without a word
    path.write_bytes(data)
    capsys.readouterr()
    assert run("--resume", "auto") == 0
    error = capsys.readouterr().err.replace("\\", "/")
    assert "Skipping out/step-00000008: lit_model.pth is damaged" in error
    assert error.count("out/step-00000008:") == 1 and "use another" not in error  # another is what it uses
    assert "renamed to superseded-step-00000008" in error
    assert_same_run("out", "whole")
    assert Path("out/superseded-step-00000008").is_dir()


def test_the_end_of_another_history_is_not_gone_on_with(at_step: Callable) -> None:
    assert run() == 0
    at_step(2, lambda: signal.raise_signal(signal.SIGTERM))
    assert run("--resume", "out/step-00000004") == 0
    # step-00000008 and final/, of the run before
    assert sorted(path.name for path in Path("out").glob("superseded-*")) == [
        "superseded-step-00000008",
        "superseded-step-00000008.1",
    ]
    # a signal that comes while a step is judged counts in the next one
    assert checkpoints_of(Path("out"))[0].name == "step-00000007"


def test_a_signal_in_the_last_step_changes_nothing(
    at_step: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    at_step(7, lambda: signal.raise_signal(signal.SIGTERM))
    assert run() == 0
    out = capsys.readouterr().out
    assert "Trained" in out and "Stopped after" not in out
    assert Path("out/final/lit_model.pth").is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
def test_the_checkpoint_resumed_from_is_not_held_so_that_deleting_it_makes_room(
    optimizer: str, at_step: Callable
) -> None:
    flags = ("--optimizer", f"torch.optim.{optimizer}")
    assert run("--max_tokens", 4 * 256, *flags) == 0
    shutil.rmtree("out/final")
    # a checkpoint that an earlier test could not load
    gc.collect()
    maps: list[str] = []
    at_step(3, lambda: maps.append(Path("/proc/self/maps").read_text(encoding="utf-8")))
    assert run("--resume", "auto", "--max_tokens", 8 * 256, *flags) == 0
    assert len(maps) == 1 and "lit_model.pth" not in maps[0]


def test_what_a_kill_amid_a_save_leaves_is_removed_or_put_back() -> None:
    assert run("--max_tokens", 1024) == 0
    shutil.rmtree("out/final")
    Path("out/.step-00000008.tmp").mkdir()
    Path("out/.step-00000008.tmp/lit_model.pth").write_bytes(b"half")
    shutil.copytree("out/step-00000004", "out/.final.old")  # moved aside, and the new one had not come
    writer.tidy(Path("out"), start_step=4)
    names = {path.name for path in Path("out").iterdir() if path.name[:4] in (".ste", ".fin", "step", "fina")}
    assert names == {"step-00000004", "final"}


def test_training_waits_for_the_copy_alone_and_the_copy_does_not_change_with_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run("--max_tokens", 7 * 256, "--out_dir", "out") == 0
    order: list[str] = []
    write, before_step, at_last_step = writer.write_state, LoopHooks.before_step, threading.Event()

    def slow_write(*args: object) -> dict:
        at_last_step.wait(60)
        result = write(*args)
        order.append("written")
        return result

    def step(hooks: LoopHooks, *args: object) -> None:
        order.append(f"step {hooks.step + 1}")
        if hooks.step == 6:
            at_last_step.set()
        before_step(hooks, *args)

    monkeypatch.setattr(writer, "write_state", slow_write)
    monkeypatch.setattr(LoopHooks, "before_step", step)
    assert run("--out_dir", "slow", "--max_tokens", 7 * 256) == 0
    assert order.index("step 7") < order.index("written")
    one, other = weights("slow/step-00000004"), weights("out/step-00000004")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_full_disk_while_saving_lets_training_go_on_and_the_next_save_succeed(
    at_step: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, usages = shutil.disk_usage("."), []

    def disk_usage(_: object) -> object:
        usages.append(1)
        return usage._replace(free=1000) if len(usages) in (2, 3) else usage  # 1: the check before training

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    assert run() == 0
    error = capsys.readouterr().err.replace("\\", "/")
    assert "Warning: out/step-00000004 could not be saved: it needs 1," in error
    assert "bytes but 1,000 were free; make room on that disk; training goes on" in error
    assert sorted(path.name for path in Path("out").iterdir() if path.name[:3] in ("ste", "fin", ".st")) == [
        "final",
        "step-00000008",
    ]


def test_a_full_disk_ends_the_run_where_the_option_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, usages = shutil.disk_usage("."), []

    def disk_usage(_: object) -> object:
        usages.append(1)
        return usage._replace(free=1000) if len(usages) > 2 else usage  # from the second save on

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    flags = ("--max_tokens", 10**5 * 256, "--train.log_interval", 1000)
    assert run(*flags, "--checkpoints.on_full_disk", "stop") == 1
    error = capsys.readouterr().err.replace("\\", "/")
    assert "error: out/step-00000008 could not be saved: it needs" in error
    assert "continue with --resume auto" in error
    assert checkpoint_flaw(Path("out/step-00000004")) is None
    assert sum(path.name.startswith("step-") for path in Path("out").iterdir()) == 1


def test_a_save_that_fails_just_when_it_is_asked_for_is_told_with_its_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_just_now(saver: writer.CheckpointWriter) -> bool:
        saver.failure = "out/step-00000004 could not be saved: a reason"
        return True

    monkeypatch.setattr(writer.CheckpointWriter, "must_end_run", property(fail_just_now))
    assert run() == 1
    told = "error: out/step-00000004 could not be saved: a reason; continue with --resume auto"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(10**15),
        lambda: bytearray(10**15),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")),
    ],
)
def test_out_of_memory_is_one_sentence_with_the_command_that_goes_on(
    allocate: Callable, at_step: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--out_dir", "out", "--micro_batch_size", 4)
    with pytest.MonkeyPatch.context():
        at_step(6, allocate)
        assert run(*flags) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "memory" in line]
    told, _, command = error.partition("goes on by: uv run python run_train.py ")
    figures = r"MoE-tiny, 21\.7K parameters; planned: weights .* GB, of [\d.]+"
    beginning = rf"error: out of memory with train.micro_batch_size 4 \({figures}\); "
    assert re.fullmatch(f"{beginning}--activation_checkpointing saves some; with less memory it ", told)
    assert command == "--config train_config.yaml --out_dir out --micro_batch_size 2 --resume auto"
    assert run(*command.split()[2:]) == 0
    assert checkpoint_flaw(Path("out/final")) is None


def test_without_a_smaller_micro_batch_other_ways_out_of_memory_are_named(
    at_step: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    at_step(1, lambda: bytearray(10**15))
    assert run("--micro_batch_size", 1) == 1
    error = capsys.readouterr().err
    assert "error: out of memory with train.micro_batch_size 1 (MoE-tiny, 21.7K parameters; planned" in error
    assert ", and none is smaller; choose --activation_checkpointing, a smaller model" in error


def test_a_report_that_fails_says_where_the_model_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(summary, "final_story", lambda _: bytearray(10**15))
    assert run("--max_tokens", 256) == 1
    assert "error: the model is in out/final, but its report failed" in capsys.readouterr().err.replace(
        "\\", "/"
    )


def test_a_full_disk_ends_no_run_and_loses_no_row(
    small_disk: Path, at_step: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    filler = small_disk / "filler"

    def fill() -> None:
        with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
            while file.write(b"\0" * 4096):
                pass

    at_step(5, fill)
    at_step(10, filler.unlink)
    out = str(small_disk / "out")
    assert run("--out_dir", out, "--max_tokens", 12 * 256, "--train.log_interval", 1, *BALANCED) == 0
    assert "step-00000008 could not be saved: it needs" in capsys.readouterr().err
    assert [row["step"] for row in rows(out) if row["loss"]] == [str(step) for step in range(1, 13)]
    assert (small_disk / "out/logs/expert_load.csv").read_text(encoding="utf-8").count("\n") == 1 + 2 * 12
    assert checkpoint_flaw(small_disk / "out/final") is None


def test_a_disk_that_fills_up_while_the_weights_are_written_leaves_the_earlier_checkpoints_whole(
    small_disk: Path, at_step: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    filler, write_state = small_disk / "filler", writer.write_state

    def write(state: dict, path: Path) -> dict:  # another process takes the room after it was looked for
        if path.parent.name.startswith(".step-00000008."):
            filler.write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - 150_000))
        return write_state(state, path)

    monkeypatch.setattr(writer, "write_state", write)
    at_step(11, lambda: filler.unlink())
    assert run("--out_dir", small_disk / "out", "--max_tokens", 12 * 256) == 0
    error = capsys.readouterr().err
    told = re.search(r"step-00000008 could not be saved: it needs (\S+) bytes but (\S+) were free", error)
    needed, free = (int(number.replace(",", "")) for number in told.groups())
    assert 0 < free < needed
    names = sorted(path.name for path in (small_disk / "out").glob("*") if path.name[0] in "sf")
    assert names == ["final", "step-00000004", "step-00000012"]
    for name in names:
        assert checkpoint_flaw(small_disk / "out" / name) is None


def test_what_somebody_puts_into_a_checkpoint_outlives_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--checkpoints.keep_last", 1, "--train.save_interval", 2)
    assert run(*flags, "--max_tokens", 4 * 256) == 0
    Path("out/final/notes.txt").write_text("mine", encoding="utf-8")
    Path("out/final/plots").mkdir()
    Path("out/final/plots/a.png").write_bytes(b"png")
    Path("out/step-00000004/notes.txt").write_text("mine too", encoding="utf-8")
    capsys.readouterr()
    assert run(*flags, "--resume", "auto") == 0
    assert Path("out/final/notes.txt").read_text(encoding="utf-8") == "mine"
    assert Path("out/final/plots/a.png").read_bytes() == b"png"
    assert sorted(path.name for path in Path("out").glob("step-*")) == ["step-00000004", "step-00000008"]
    assert "".join(capsys.readouterr()).count("is kept: notes.txt in it is not the run's") == 1
    assert checkpoint_flaw(Path("out/final")) is None


def test_a_finished_run_that_is_resumed_leaves_its_final_checkpoint_as_it_was() -> None:
    assert run() == 0
    before = {path.name: path.read_bytes() for path in Path("out/final").iterdir()}
    assert run("--resume", "auto") == 0
    assert {path.name: path.read_bytes() for path in Path("out/final").iterdir()} == before
    Path("out/final/model_config.yaml").unlink()
    shutil.rmtree("out/final")
    assert run("--resume", "auto") == 0
    assert checkpoint_flaw(Path("out/final")) is None


def test_a_finished_run_that_is_resumed_is_not_validated_again(capsys: pytest.CaptureFixture[str]) -> None:
    # so that final/ alone is at the last step, as after most runs
    assert run("--train.save_interval", 100) == 0
    before = Path("out/logs/csv/metrics.csv").read_bytes()
    loss = re.search(r"[0-9.]+ in validation", capsys.readouterr().out)
    assert loss
    for _ in range(2):
        assert run("--resume", "auto", "--train.save_interval", 100) == 0
        assert Path("out/logs/csv/metrics.csv").read_bytes() == before
        assert loss[0] in capsys.readouterr().out
    # without its log the loss is not known
    Path("out/logs/csv/metrics.csv").unlink()
    assert run("--resume", "auto", "--train.save_interval", 100) == 0
    assert loss[0] in capsys.readouterr().out and [row["step"] for row in rows()] == ["8"]
