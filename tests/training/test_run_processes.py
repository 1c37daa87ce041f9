"""Real processes: two of them train one model, and one that is killed again and again still gets there."""

import gc
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import yaml
from conftest import OFFLINE, ROOT, SENTENCES, TINY_CONFIG
from helpers.runs import (
    BALANCED,
    assert_same_run,
    fp16_on_the_cpu,
    go_back,
    gradient_times,
    losses,
    rows,
    run,
)

from litgpt_moe.checkpoints.reader import checkpoint_flaw

pytestmark = pytest.mark.usefixtures("eager", "workspace")

RUN = [sys.executable, str(ROOT / "run_train.py"), "--config", "train_config.yaml"]


def start(*flags: object, command: Sequence[str] = RUN) -> subprocess.Popen:
    """Start run_train.py as a user would, in a process group of its own."""
    with Path("log.txt").open("ab") as file:
        return subprocess.Popen(
            [*command, *map(str, flags)],
            env={**os.environ, **OFFLINE},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(process: subprocess.Popen) -> None:
    status = process.wait(timeout=600)
    assert status == 0, Path("log.txt").read_text(encoding="utf-8")[-3000:]


def validation(out_dir: str) -> list[float]:
    return [float(row["val_loss"]) for row in rows(out_dir) if row["val_loss"]]


# --- two processes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["AdamW", pytest.param("Muon", marks=pytest.mark.slow)])
def test_two_processes_train_as_one_and_either_resumes_the_other(optimizer: str) -> None:
    # Muon orthogonalises in bf16, whatever the precision of the weights
    rounding = {"AdamW": 1e-5, "Muon": 1e-2}[optimizer]
    # 93 sequences and 28 steps of 4: both reach into the second epoch
    flags = ["--max_tokens", 28 * 256, "--micro_batch_size", 1, "--optimizer", optimizer, *BALANCED]
    two = start("--out_dir", "two", *flags, "--devices", 2)
    assert run("--out_dir", "one", *flags) == 0
    finish(two)
    assert Path("log.txt").read_text(encoding="utf-8").count("Devices 2 by DDP (FSDP needs GPUs)") == 1
    assert losses("two") == pytest.approx(losses("one"), abs=rounding)
    assert validation("two") == pytest.approx(validation("one"), abs=rounding)
    for column in ("step", *(key for key in rows("one")[0] if key.startswith("moe/dead_experts"))):
        assert [row[column] for row in rows("two")] == [row[column] for row in rows("one")]

    go_back(12, "one", "two")
    first = losses("one")
    more = start("--out_dir", "one", *flags, "--devices", 2, "--resume", "auto", "--activation_checkpointing")
    assert run("--out_dir", "two", *flags, "--resume", "auto") == 0
    finish(more)
    assert losses("two") == pytest.approx(first, abs=rounding)
    assert losses("one") == pytest.approx(first, abs=rounding)
    assert validation("one") == pytest.approx(validation("two"), abs=rounding)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no NCCL, which FSDP wants on GPUs")
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_sharded_processes_train_as_one_and_either_resumes_the_other(tied: bool) -> None:
    flags = ["--max_tokens", 20 * 256, "--micro_batch_size", 1, "--train.tie_embeddings", tied, *BALANCED]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    script = [str(ROOT / "tests/helpers/fsdp_on_cpu.py"), *RUN[2:]]
    sharded = [*launcher, *script, "--devices", "2", "--accelerator", "auto"]
    both = start("--out_dir", "sharded", *flags, command=sharded)
    assert run("--out_dir", "one", *flags) == 0
    finish(both)
    text = Path("log.txt").read_text(encoding="utf-8")
    assert "ShardedStrategy" in text and text.count("Devices 2 by FSDP (asked for here)") == 1
    expected = losses("one")
    assert losses("sharded") == pytest.approx(expected, abs=1e-5)

    go_back(12, "one", "sharded")
    recomputed = ["--resume", "auto", "--activation_checkpointing"]
    more = start("--out_dir", "one", *flags, *recomputed, command=sharded)
    assert run("--out_dir", "sharded", *flags, "--resume", "auto") == 0
    finish(more)
    for name in ("one", "sharded"):
        assert losses(name) == pytest.approx(expected, abs=1e-5)
        assert json.loads(Path(name, "final/checkpoint.json").read_text(encoding="utf-8"))["step"] == 20


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no NCCL, which FSDP wants on GPUs")
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_gradient_that_overflows_in_one_process_is_skipped_in_both(strategy: str) -> None:
    flags = ["--max_tokens", 12 * 256, "--micro_batch_size", 1, "--precision", "16-mixed", *BALANCED]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    script = [str(ROOT / "tests/helpers/fp16_on_cpu.py"), strategy, *RUN[2:], "--devices", "2"]
    accelerator = ["--accelerator", "auto"] if strategy == "fsdp" else []
    both = start("--out_dir", "two", *flags, command=[*launcher, *script, *accelerator])
    with fp16_on_the_cpu(), gradient_times(math.inf, 10):  # in step 3, as in rank 1
        assert run("--out_dir", "one", *flags) == 0
    finish(both)
    for name in ("one", "two"):
        logged = [row for row in rows(name) if row["loss"]]
        assert [float(row["loss_scale"]) for row in logged] == [65536] * 2 + [32768] * 10
        assert [row["overflow_steps"] for row in logged] == ["0"] * 2 + ["1"] * 10
        state = torch.load(Path(name, "final/lit_model.pth"), weights_only=True)
        assert state["run"]["loss_scale"] == {"scale": 32768.0, "growth_tracker": 9, "n_overflows": 1}
    assert losses("two") == pytest.approx(losses("one"), abs=0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM for another process")
# kill PID; Ctrl-C, scancel, torchrun
@pytest.mark.parametrize("reached", ["both", pytest.param("one", marks=pytest.mark.slow)])
def test_a_signal_to_one_or_both_of_two_processes_ends_them_after_the_same_step(reached: str) -> None:
    # a worker process that reads the data gets it too, and the run needs its batches to the end
    workers = ("--data.init_args.num_workers", 1)
    process = start("--max_tokens", 10**6 * 256, "--devices", 2, "--train.log_interval", 5, *workers)
    wait_for(lambda: Path("out/logs/csv/metrics.csv").exists(), process)
    process.send_signal(signal.SIGTERM) if reached == "one" else os.killpg(process.pid, signal.SIGTERM)
    finish(process)
    text = Path("log.txt").read_text(encoding="utf-8")
    (stopped,) = re.findall(r"Stopped after step ([\d,]+)", text)
    assert "Traceback" not in text
    newest = max(path.name for path in Path("out").glob("step-*"))
    assert newest == f"step-{int(stopped.replace(',', '')):08d}"


@pytest.mark.slow  # Lightning looks every five seconds for a process that has failed, and kills the others
def test_processes_that_give_up_let_the_first_one_save() -> None:
    Path("slow_saves.py").write_text(
        "import time, run_train\n"
        "from litgpt_moe.checkpoints import writer\n"
        "write = writer.write_state\n"
        "writer.write_state = lambda *args: (time.sleep(15), write(*args))[1]\n"
        "raise SystemExit(run_train.main())\n",
        encoding="utf-8",
    )
    flags = ["--optimizer.lr", 1e30, "--optimizer.weight_decay", 0, "--train.lr_warmup_steps", 0]
    command = [sys.executable, "slow_saves.py", *RUN[2:]]
    flags += ["--train.save_interval", 1, "--guard.max_skipped_steps", 1, "--devices", 2]
    process = start(*flags, command=command)
    status, text = process.wait(timeout=600), Path("log.txt").read_text(encoding="utf-8").replace("\\", "/")
    assert status == 1, text
    assert text.count("continue from out/step-00000001 with --resume auto") == 2, text
    assert checkpoint_flaw(Path("out/step-00000001")) is None


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM for another process")
def test_a_second_signal_leaves_at_once_and_does_no_harm() -> None:
    # a step of 4,000 micro-batches, which nobody waits for
    process = start("--global_batch_size", 4000, "--micro_batch_size", 1, "--max_tokens", 4000 * 64)
    log = Path("log.txt")
    assert wait_for(lambda: "\nRun  " in log.read_text(encoding="utf-8"), process)
    process.send_signal(signal.SIGTERM)
    assert wait_for(lambda: "saving the last whole step" in log.read_text(encoding="utf-8"), process)
    assert process.poll() is None
    # the same signal a moment later is taken for the same request
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 128 + signal.SIGINT
    assert "Traceback" not in log.read_text(encoding="utf-8")
    assert run("--resume", "auto") == 0  # no lock and nothing half written is in its way
    assert [row["step"] for row in rows() if row["loss"]] == [str(step) for step in range(1, 9)]


# --- kills --------------------------------------------------------------------------------------------------


def wait_for(event: Callable[[], bool], process: subprocess.Popen, seconds: float = 600) -> bool:
    """Return whether `event` came before the process ended."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if event():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    raise AssertionError("nothing happened in time")


def kill(process: subprocess.Popen) -> None:
    """Kill a process and its children, as a power cut does: no handler runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL) if sys.platform != "win32" else process.kill()
        process.wait()
    elif process.returncode:
        raise AssertionError(Path("log.txt").read_text(encoding="utf-8")[-3000:])


@pytest.fixture
def long_job(workspace: Path, tiny_tokenizer_dir: Path) -> Path:
    """Raw text that takes a moment to tokenize, and a model whose checkpoints take a moment to write."""
    random.seed(5)
    for split, n_stories in (("train", 3000), ("val", 40)):
        Path("text", split).mkdir(parents=True)
        stories = (
            " ".join(random.choices(SENTENCES, k=6)) + f" It was day {n}.\n<|endoftext|>\n"
            for n in range(n_stories)
        )
        Path("text", split, "stories.txt").write_text("".join(stories), encoding="utf-8")
    model = {**TINY_CONFIG, "n_embd": 64, "n_head": 4, "moe_intermediate_size": 64, "n_expert": 8}
    Path("model_config.yaml").write_text(yaml.dump(model), encoding="utf-8")
    settings = yaml.safe_load(Path("train_config.yaml").read_text(encoding="utf-8"))
    settings["data"]["init_args"] = {"train_data_path": "text/train"}
    settings["train"] |= {"max_tokens": 120 * 256, "save_interval": 3, "log_interval": 1}
    settings["eval"] |= {"interval": 25}
    settings["checkpoints"] = {"keep_last": 3}
    settings["moe"] = {"aux_loss_coef": 0.01, "z_loss_coef": 0.001, "bias_update_rate": 0.01}
    settings["seed"] = 11
    Path("train_config.yaml").write_text(yaml.dump(settings), encoding="utf-8")
    return workspace


def is_saving(out_dir: str) -> bool:
    return any(Path(out_dir).glob(".*.tmp"))


def is_tokenizing() -> bool:
    return any(Path("text").glob("**/*.bin*")) and not Path("text/manifest.json").exists()


def survive(n_kills: int, seed: int) -> dict[str, int]:
    """Kill the run `n_kills` times, inside tokenizing, inside a save and anywhere; return what was hit."""
    rng, hit = random.Random(seed), {"tokenizing": 0, "saving": 0, "anywhere": 0, "came to its end": 0}
    flags = ("--out_dir", "parts", "--resume", "auto")
    for n in range(n_kills):
        moment = ("tokenizing", "saving", "anywhere")[n % 3]
        if moment == "tokenizing":  # from nothing, or again because a shard is gone
            Path("text/manifest.json").unlink(missing_ok=True)
            for shard in Path("text").glob("**/*.bin"):
                gc.collect()  # a run of this process has had them mapped, and Windows deletes no such file
                shard.unlink()
        process = start(*flags)
        if moment == "anywhere":
            came = _sleep(process, rng.uniform(0, 25))
        else:
            event = is_tokenizing if moment == "tokenizing" else lambda: is_saving("parts")
            came = wait_for(event, process)
            time.sleep(rng.uniform(0, 0.02))  # some way into it
        kill(process)
        hit[moment if came else "came to its end"] += 1
    finish(start(*flags))
    return hit


def _sleep(process: subprocess.Popen, seconds: float) -> bool:
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def assert_survived(n_kills: int, seed: int) -> None:
    assert run("--out_dir", "whole") == 0
    shards = {path.name: path.read_bytes() for path in sorted(Path("text").glob("**/*.bin"))}
    hit = survive(n_kills, seed)
    print(f"{n_kills} kills, seed {seed}: {hit}")
    assert {path.name: path.read_bytes() for path in sorted(Path("text").glob("**/*.bin"))} == shards
    assert_same_run("parts", "whole")
    text = Path("log.txt").read_text(encoding="utf-8")
    assert "Traceback" not in text and "error:" not in text
    assert not any(Path("parts").glob(".*.tmp"))


def test_a_run_killed_while_tokenizing_while_saving_and_anywhere_ends_as_if_nothing_had_happened(
    long_job: Path,
) -> None:
    assert_survived(3, seed=int(os.environ.get("CHAOS_SEED", "1")))


@pytest.mark.by_hand
def test_a_run_killed_a_hundred_times_ends_as_if_nothing_had_happened(long_job: Path) -> None:
    assert_survived(int(os.environ.get("CHAOS_KILLS", "100")), seed=int(os.environ.get("CHAOS_SEED", "2")))
