"""Runs that are stopped, starved, poisoned or doubled end as if nothing had happened, or say why not."""

import contextlib
import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import litgpt
import pytest
import torch
from test_run_train import edit_yaml, losses, rows, run, weights, workspace  # noqa: F401

import moe_layers
import run_train

pytestmark = pytest.mark.usefixtures("eager", "workspace")

# what a clock or the machine says; everything else must be equal
TIMING = {"time_s", "tokens_per_s", "iter_time", "remaining_time", "peak_memory_gb", "mfu"}


BALANCED = ("--moe.aux_loss_coef", 0.01, "--moe.z_loss_coef", 0.001, "--moe.bias_update_rate", 0.01)


def history(out_dir: str) -> list[dict[str, str]]:
    """The rows of metrics.csv without their times."""
    return [{key: text for key, text in row.items() if key not in TIMING} for row in rows(out_dir)]


def assert_same_run(out_dir: str, expected: str) -> None:
    one, other = (
        torch.load(Path(path, "final/lit_model.pth"), weights_only=True) for path in (out_dir, expected)
    )
    for name, tensor in run_train.tensors_of({key: one[key] for key in ("model", "optimizer")}):
        same = dict(run_train.tensors_of({key: other[key] for key in ("model", "optimizer")}))[name]
        assert torch.equal(tensor, same), name
    assert one["train_dataloader"] == other["train_dataloader"]
    assert history(out_dir) == history(expected)
    for name in ("expert_load.csv", "stories.csv", "spikes.csv"):
        logs = [Path(path, "logs", name) for path in (out_dir, expected)]
        assert len({log.read_bytes() if log.exists() else None for log in logs}) == 1, name


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Have something happen while a step is computed, as a signal does."""

    def schedule(step: int, act: Callable[[], object]) -> None:
        is_bad, calls = run_train.Guard.is_bad, []

        def watched(guard: run_train.Guard, loss: float, norm: float) -> bool:
            calls.append(loss)
            if len(calls) == step:
                act()
            return is_bad(guard, loss, norm)

        monkeypatch.setattr(run_train.Guard, "is_bad", watched)

    return schedule


@contextlib.contextmanager
def loss_times(factor: float, *calls: int) -> Iterator[None]:
    """Multiply the loss of the given calls of LitGPT's loop (1 is the first after its sanity check)."""
    original, n_calls = moe_layers.linear_cross_entropy, 0

    def cross_entropy(hidden: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        nonlocal n_calls
        n_calls += hidden.requires_grad
        loss = original(hidden, *args, **options)
        return loss * factor if hidden.requires_grad and n_calls in calls else loss

    moe_layers.linear_cross_entropy = cross_entropy
    try:
        yield
    finally:
        moe_layers.linear_cross_entropy = original


# --- exact resume and signals -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_ends_the_run_after_its_step_and_resume_gives_the_run_that_never_stopped(
    name: str, at_step: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    if not hasattr(signal, name):
        pytest.skip(f"{name} is not known here")
    # 93 sequences: 40 steps of 4 reach into the second epoch; 4 micro-batches a step; two worker processes
    common = ["--max_tokens", 40 * 256, "--micro_batch_size", 1, "--data.init_args.num_workers", 2]
    common += [*BALANCED, "--train.log_interval", 2]  # the end comes between two rows
    common += ["--eval.max_new_tokens", 5]
    assert run("--out_dir", "whole", *common) == 0
    capsys.readouterr()
    at_step(26, lambda: signal.raise_signal(getattr(signal, name)))
    assert run("--out_dir", "parts", *common) == 0
    output = capsys.readouterr()
    assert f"Stopped after step 27 of 40 ({name})" in output.out
    assert "run_train.py --config train_config.yaml --out_dir parts" in output.out
    assert output.out.rstrip().endswith("--resume auto")
    assert not Path("parts/final").exists() and Path("parts/step-00000027").is_dir()
    assert run("--out_dir", "parts", *common, "--resume", "auto") == 0
    assert_same_run("parts", "whole")
    assert int(rows("parts")[-1]["epoch"] or 1) == 1


def test_final_is_resumed_as_exactly_as_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--schedule.name", "constant", "--train.save_interval", 100)
    assert run("--out_dir", "whole", "--max_tokens", 12 * 256, *flags) == 0
    assert run("--out_dir", "parts", "--max_tokens", 8 * 256, *flags) == 0
    assert run("--out_dir", "more", "--max_tokens", 12 * 256, *flags, "--resume", "parts/final") == 0
    one, other = weights("whole/final"), weights("more/final")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_rows_that_a_killed_process_wrote_after_its_last_checkpoint_come_once(at_step: Callable) -> None:
    assert run("--out_dir", "whole") == 0
    shutil.copytree("whole", "parts")
    shutil.rmtree("parts/final")
    shutil.rmtree("parts/step-00000008")
    with Path("parts/logs/csv/metrics.csv").open("a", encoding="utf-8") as file:
        file.write("9,23")  # torn by the kill
    assert run("--out_dir", "parts", "--resume", "auto") == 0
    assert_same_run("parts", "whole")


@pytest.mark.parametrize("key", run_train.FIGURES)
@pytest.mark.parametrize("odd", [torch.zeros(0), torch.zeros(2), [torch.zeros(0)], None, "1", True, -2, {}])
def test_a_figure_of_a_training_state_is_no_tensor_text_or_bool(key: str, odd: object) -> None:
    assert run_train.FIGURES[key](odd) is False


def test_the_state_of_every_random_generator_is_put_back() -> None:
    import random

    import numpy as np

    def draw() -> list[float]:
        return [random.random(), np.random.rand(), torch.rand(1).item()]

    draw()
    state = run_train.rng_state()
    first = draw()
    draw()
    run_train.set_rng_state(state)
    assert draw() == first


def test_a_plain_loader_of_another_data_module_resumes_in_its_shuffled_order() -> None:
    from torch.utils.data import DataLoader

    class FakeMonitor:
        is_finished, ending = False, ""
        run = type("Run", (), {"settings": run_train.Settings(seed=3)})

    def loader() -> run_train.TrainLoader:
        plain = DataLoader(list(range(10)), batch_size=2, shuffle=True)
        return run_train.TrainLoader(plain, FakeMonitor())

    def batches(train: run_train.TrainLoader, n: int) -> list[list[int]]:
        found: list[list[int]] = []
        while len(found) < n:
            for batch in train:
                found.append(batch.tolist())
                if len(found) == n:
                    break
        return found

    whole = batches(loader(), 13)
    assert sorted(sum(whole[:5], [])) == list(range(10)) and whole[:5] != whole[5:10]  # noqa: RUF017
    first, second = loader(), loader()
    assert batches(first, 8) == whole[:8]
    second.load_state_dict(first.state_dict())
    assert batches(second, 5) == whole[8:]


def test_max_time_saves_and_ends_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    assert run("--max_tokens", 10**6 * 256, "--train.max_time", 6, "--train.log_interval", 100) == 0
    # the clock starts with the command; 4 s more are for a busy machine
    assert time.monotonic() - started < 10
    output = capsys.readouterr().out
    assert "(train.max_time of 6 s)" in output and "--resume auto" in output
    step = max(Path("out").glob("step-*"))
    assert run_train.checkpoint_flaw(step) is None


# --- checkpoints --------------------------------------------------------------------------------------------


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
    assert run("--resume", "out/final", "--out_dir", "other") == 2
    assert "optimizer.param_groups.1.fused is no setting" in capsys.readouterr().err


def test_a_model_without_finite_logits_tells_no_story(tiny_checkpoint: Path) -> None:
    model, tokenizer = moe_layers.load_model(tiny_checkpoint), litgpt.Tokenizer(tiny_checkpoint)
    assert run_train.write_story(model, tokenizer, 5).startswith(run_train.PROMPT)
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)  # finite themselves
    assert run_train.write_story(model, tokenizer, 5) == "(none: the model's logits are not finite)"


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
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
def test_the_checkpoint_resumed_from_is_not_held_so_that_deleting_it_makes_room(
    optimizer: str, at_step: Callable
) -> None:
    flags = ("--optimizer", f"torch.optim.{optimizer}")
    assert run("--max_tokens", 4 * 256, *flags) == 0
    shutil.rmtree("out/final")
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
    run_train.tidy(Path("out"), start_step=4)
    names = {path.name for path in Path("out").iterdir() if path.name[:4] in (".ste", ".fin", "step", "fina")}
    assert names == {"step-00000004", "final"}


def test_training_waits_for_the_copy_alone_and_the_copy_does_not_change_with_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run("--max_tokens", 7 * 256, "--out_dir", "out") == 0
    order: list[str] = []
    write, before_step = run_train.write_state, run_train.Monitor.before_step

    def slow_write(*args: object) -> dict:
        time.sleep(0.5)
        result = write(*args)
        order.append("written")
        return result

    def step(monitor: run_train.Monitor, *args: object) -> None:
        order.append(f"step {monitor.step + 1}")
        before_step(monitor, *args)

    monkeypatch.setattr(run_train, "write_state", slow_write)
    monkeypatch.setattr(run_train.Monitor, "before_step", step)
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
        return usage._replace(free=1000) if len(usages) == 2 else usage  # 1: the check before training

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
    assert run_train.checkpoint_flaw(Path("out/step-00000004")) is None
    assert sum(path.name.startswith("step-") for path in Path("out").iterdir()) == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MB, where this process may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root on Linux")
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_while_the_weights_are_written_leaves_the_earlier_checkpoints_whole(
    small_disk: Path, at_step: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    filler, write_state = small_disk / "filler", run_train.write_state

    def write(state: dict, path: Path) -> dict:  # another process takes the room after it was looked for
        if path.parent.name == ".step-00000008.tmp":
            filler.write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - 150_000))
        return write_state(state, path)

    monkeypatch.setattr(run_train, "write_state", write)
    at_step(11, lambda: filler.unlink())
    assert run("--out_dir", small_disk / "out", "--max_tokens", 12 * 256) == 0
    error = capsys.readouterr().err
    told = re.search(r"step-00000008 could not be saved: it needs (\S+) bytes but (\S+) were free", error)
    needed, free = (int(number.replace(",", "")) for number in told.groups())
    assert 0 < free < needed
    names = sorted(path.name for path in (small_disk / "out").glob("*") if path.name[0] in "sf")
    assert names == ["final", "step-00000004", "step-00000012"]
    for name in names:
        assert run_train.checkpoint_flaw(small_disk / "out" / name) is None


# --- the numerical guard ------------------------------------------------------------------------------------


def test_a_step_without_a_finite_loss_changes_no_weight_and_is_counted() -> None:
    flags = ("--train.save_interval", 1, "--micro_batch_size", 2)  # two micro-batches a step
    with loss_times(math.nan, 6):  # the second of step 3
        assert run(*flags) == 0
    before, bad, after = (weights(f"out/step-0000000{step}") for step in (2, 3, 4))
    assert all(torch.equal(before[name], bad[name]) for name in before)
    assert not all(torch.equal(bad[name], after[name]) for name in before)
    assert [row["skipped_steps"] for row in rows() if row["loss"]] == ["0", "0"] + ["1"] * 6
    assert math.isfinite(losses()[-1]) and math.isnan(losses()[2])


def test_weights_that_are_no_numbers_are_never_saved(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    after_step = run_train.Monitor.on_after_optimizer_step

    def overflow(monitor: run_train.Monitor, strategy: object, optimizer: torch.optim.Optimizer) -> None:
        after_step(monitor, strategy, optimizer)
        if monitor.step == 3:  # as an update with a finite gradient can, in bf16
            optimizer.param_groups[0]["params"][1].data[0, 0] = math.inf

    monkeypatch.setattr(run_train.Monitor, "on_after_optimizer_step", overflow)
    assert run("--train.save_interval", 1) == 1
    error = capsys.readouterr().err.replace("\\", "/")
    assert "error: out/step-00000003 could not be saved: model." in error
    assert "holds values that are no numbers" in error
    saved = sorted(path.name for path in Path("out").iterdir() if path.is_dir())
    assert saved == ["logs", "step-00000001", "step-00000002"]


def test_a_loss_spike_is_written_down_with_the_place_of_its_batch(
    tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sys.path.insert(0, str(Path(run_train.__file__).parent / "tools"))
    import show_batch

    with loss_times(50.0, 41 * 2):  # the second micro-batch of step 41
        assert run("--max_tokens", 45 * 256, "--train.lr_warmup_steps", 20, "--optimizer.lr", 0.001) == 0
    assert "step 41: the loss" in capsys.readouterr().err
    with Path("out/logs/spikes.csv").open(encoding="utf-8", newline="") as file:
        (spike,) = csv.DictReader(file)
    assert (spike["step"], spike["first_sequence"]) == ("41", "160")
    assert float(spike["loss"]) > float(spike["mean"]) + 6 * float(spike["sigma"])
    assert show_batch.main(["out", "--step", "41"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("--- step 41, sequence") == 4 and " liked that." in shown


def test_the_stories_of_a_step_are_shown_from_any_folder(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.path.insert(0, str(Path(run_train.__file__).parent / "tools"))
    import show_batch

    shutil.copytree(tiny_data, "data/mine")
    assert run("--max_tokens", 256, "--out_dir", "runs/one", "--dataset_dir", "data/mine") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert show_batch.main(["../runs/one", "--step", "1"]) == 0
    assert capsys.readouterr().out.count("--- step 1, sequence") == 4
    for step in ("0", "2"):
        assert show_batch.main(["../runs/one", "--step", step]) == 2
        assert f"error: --step is {step}; choose 1 to 1, the steps of " in capsys.readouterr().err
    (tmp_path / "runs/one").rename(tmp_path / "moved")
    assert show_batch.main(["../moved", "--step", "1"]) == 2
    error = capsys.readouterr().err.replace("\\", "/")
    assert error.startswith("error: data/mine/manifest.json: not found; ") and "--data_dir" in error
    assert show_batch.main(["../moved", "--step", "1", "--data_dir", "../data/mine"]) == 0


def test_a_resumed_run_goes_on_with_the_losses_and_counts_of_its_guard(at_step: Callable) -> None:
    flags = ("--max_tokens", 45 * 256, "--train.lr_warmup_steps", 20, "--optimizer.lr", 0.001)
    with loss_times(math.nan, 30), loss_times(50.0, 41 * 2):
        assert run("--out_dir", "whole", *flags) == 0
    at_step(37, lambda: signal.raise_signal(signal.SIGTERM))
    with loss_times(math.nan, 30):
        assert run("--out_dir", "parts", *flags) == 0
    with loss_times(50.0, (41 - 38) * 2):
        assert run("--out_dir", "parts", *flags, "--resume", "auto") == 0
    assert_same_run("parts", "whole")
    spikes = [Path(name, "logs/spikes.csv").read_text(encoding="utf-8") for name in ("whole", "parts")]
    assert spikes[0] == spikes[1] and spikes[0].count("\n") == 2


def test_a_validation_loss_too_large_for_its_exponential_ends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from litgpt import pretrain

    monkeypatch.setattr(pretrain, "validate", lambda *_, **__: torch.tensor(1e6))
    assert run("--max_tokens", 4 * 256) == 0
    assert [row["val_loss"] for row in rows() if row["val_loss"]] == ["700.0", "700.0"]


# --- one folder, one run ------------------------------------------------------------------------------------


def test_a_second_run_into_a_live_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with run_train.run_lock(Path("out")):
        for flags in ([], ["--resume", "auto"], ["--overwrite"]):
            assert run(*flags) == 2
            assert f"out: a run is live there (process {os.getpid()} on " in capsys.readouterr().err
    assert run("--max_tokens", 256) == 0


def test_the_refusal_of_a_second_run_says_nothing_of_what_lies_in_the_folder(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run() == 0
    capsys.readouterr()
    with run_train.run_lock(Path("out")):
        assert run("--resume", "auto", "--max_tokens", 1024) == 2  # fewer tokens than it has been trained on
    (told,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Settings from")]
    assert told.startswith("error: out: a run is live there")


def test_the_lock_of_a_process_that_was_killed_holds_nobody_up() -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "import run_train\n"
        "run_train.run_lock(Path('out')).acquire(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    if sys.platform == "win32":
        code = code.replace("os.kill(os.getpid(), signal.SIGKILL)", "os._exit(9)")
    folder = str(Path(run_train.__file__).parent)
    assert subprocess.run([sys.executable, "-c", code, folder]).returncode != 0
    assert Path("out/.run.lock").exists() or sys.platform == "win32"
    assert run("--max_tokens", 256) == 0


# --- learning rate ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # 10 steps, 2 of warm-up, from 1.0 to 0.2; cosine: 0.2 + 0.4 (1 + cos(pi (step - 2) / 8))
        ("cosine", {1: 0.5, 2: 1.0, 4: 0.2 + 0.4 * (1 + math.sqrt(0.5)), 6: 0.6, 10: 0.2}),
        # the last 4 steps go down: 0.2 + 0.8 (1 - sqrt(done))
        ("wsd", {1: 0.5, 2: 1.0, 6: 1.0, 7: 0.2 + 0.8 * 0.5, 10: 0.2}),
        ("constant", {1: 0.5, 2: 1.0, 10: 1.0}),
    ],
)
def test_the_learning_rate_of_each_schedule_is_the_one_worked_out_by_hand(
    name: str, expected: dict[int, float]
) -> None:
    settings = run_train.Settings()
    settings.schedule = run_train.ScheduleArgs(name=name, decay_fraction=0.4)
    settings.train.min_lr = 0.2
    found = {step: run_train.learning_rate(settings, step, 10, 2, 1.0) for step in expected}
    assert found == pytest.approx(expected)


def test_warm_up_counts_in_tokens_or_steps() -> None:
    edit_yaml("train_config.yaml", "train.lr_warmup_steps", 4)
    assert run("--out_dir", "steps") == 0
    assert run("--out_dir", "tokens", "--schedule.warmup_tokens", 4 * 256, "--micro_batch_size", 1) == 0
    rates = [[row["learning_rate"] for row in rows(name) if row["loss"]] for name in ("steps", "tokens")]
    assert rates[0] == rates[1] and [float(rate) for rate in rates[0][:4]] == [0.0025, 0.005, 0.0075, 0.01]


def test_a_run_that_died_before_its_first_checkpoint_begins_its_log_anew(tmp_path: Path) -> None:
    log = run_train.LogFile(tmp_path / "metrics.csv")
    log.write({"step": 1, "loss": 2.0})
    again = run_train.LogFile(log.path)
    again.keep(0)
    again.write({"step": 1, "loss": 3.0})
    assert log.path.read_text(encoding="utf-8").splitlines() == ["step,loss", "1,3.0"]


def test_only_the_first_process_writes_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = run_train.LogFile(tmp_path / "spikes.csv")
    log.write({"step": 1})
    before = log.path.read_bytes()
    monkeypatch.setenv("RANK", "1")
    other = run_train.LogFile(log.path)
    other.keep(0)
    other.write({"step": 2})
    assert log.path.read_bytes() == before
