"""generate.py: the command and its refusals, a real pipe and Ctrl-C."""

import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ASSETS, SENTENCE
from tokenizers import Tokenizer as HFTokenizer

from generate import main
from litgpt_moe.generation.decode import generate, make_decoder
from litgpt_moe.generation.settings import Sampling

ROOT = Path(__file__).parents[1]
GREEDY = Sampling(temperature=0.0)

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """One thread for the module's fixtures, too: two threads wait for each other on a busy machine."""
    torch.set_num_threads(1)


# --- the command --------------------------------------------------------------------------------------------


def test_an_overfitted_model_says_its_sentence_and_stops_at_eos(
    storyteller: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--ckpt-dir", str(storyteller), "--prompt", "Lily", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out == SENTENCE + "\n"
    assert "tokens/s" in captured.err and str(storyteller) in captured.err and "float32" in captured.err


def test_samples_are_separated_as_prepare_data_reads_them(
    storyteller: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["--ckpt_dir", str(storyteller), "--prompt", "Lily", "--num_samples", "2", "--seed", "1"]) == 0
    )
    assert capsys.readouterr().out.count("\n<|endoftext|>\n") == 1


def test_each_sample_is_repeated_alone_by_its_own_seed(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--ckpt_dir", str(tiny_checkpoint), "--max_tokens", "20", "--prompt", "Tom"]
    assert main([*flags, "--seed", "5", "--num_samples", "2"]) == 0
    both = capsys.readouterr().out
    assert main([*flags, "--seed", "6"]) == 0
    assert both.endswith("\n<|endoftext|>\n" + capsys.readouterr().out)


def test_the_seed_told_repeats_the_run(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ckpt_dir", str(tiny_checkpoint), "--max_tokens", "20", "--prompt", "Tom"]
    assert main(flags) == 0
    first = capsys.readouterr()
    seed = first.err.split("seed ")[1].split()[0]
    assert main([*flags, "--seed", seed]) == 0
    assert capsys.readouterr().out == first.out


def test_a_full_context_is_told(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ckpt_dir", str(tiny_checkpoint), "--max_tokens", "500", "--seed", "3", "--temperature", "0"]
    assert main(flags) == 0
    assert "context of 64 tokens is full" in capsys.readouterr().err


def test_the_prompt_comes_from_a_file(
    storyteller: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_text("Lily had\n", encoding="utf-8")
    flags = [
        "--ckpt_dir",
        str(storyteller),
        "--prompt_file",
        str(tmp_path / "prompt.txt"),
        "--temperature",
        "0",
    ]
    assert main(flags) == 0
    assert capsys.readouterr().out == SENTENCE + "\n"


def test_the_prompt_comes_from_standard_input(
    storyteller: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Lily had a\n")))
    assert main(["--ckpt_dir", str(storyteller), "--prompt", "-", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == SENTENCE + "\n"


BAD = {
    "--max_tokens=0": "max_tokens is 0",
    "--num-samples=0": "num_samples is 0",
    "--seed=-1": "seed is -1",
    "--seed=9223372036854775808": "choose 0 or more, below 2**63",
    "--temperature=-1": "temperature is -1.0",
    "--temperature=nan": "temperature is nan",
    "--top_k=-1": "top_k is -1",
    "--top_p=0": "top_p is 0.0",
    "--top-p=1.5": "top_p is 1.5",
    "--min_p=2": "min_p is 2.0",
    "--repetition_penalty=0": "repetition_penalty is 0.0",
    "--device=abacus": "--device abacus",
    "--ckpt_dir=nowhere": "nowhere",
    "--prompt_file=nowhere.txt": "nowhere.txt",
}


@pytest.mark.parametrize("flag", BAD)
def test_a_bad_flag_ends_in_one_sentence_and_status_2(
    flag: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--prompt=x", flag] if "prompt" not in flag else [flag]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert BAD[flag] in captured.err


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--ckpt_dir", str(tiny_checkpoint), "--prompt", "Tom went " * 40]) == 2
    error = capsys.readouterr().err
    assert "block_size is 64" in error and "63 tokens or fewer" in error


def test_a_prompt_file_that_is_not_utf8_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"caf\xe9")
    assert main(["--prompt_file", str(tmp_path / "prompt.txt")]) == 2
    assert "prompt.txt is not UTF-8 at byte 3" in capsys.readouterr().err


def copied(
    folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None] | None = None
) -> Path:
    """Return a copy of a checkpoint, with its weights changed."""
    shutil.copytree(folder, target)
    if change:
        state = torch.load(target / "lit_model.pth", weights_only=True)
        change(state["model"])
        torch.save(state, target / "lit_model.pth")
    return target


def test_a_damaged_tokenizer_is_named(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(tiny_checkpoint, tmp_path / "damaged")
    (folder / "tokenizer.json").write_text('{"version": "1.0", "tru', encoding="utf-8")
    assert main(["--ckpt_dir", str(folder), "--prompt", "Tom"]) == 2
    error = capsys.readouterr().err
    assert str(folder) in error and "tokenizer files cannot be read" in error and error.count("\n") == 1


def test_the_tokenizer_of_another_model_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(tiny_checkpoint, tmp_path / "mixed")
    shutil.copyfile(ASSETS / "tokenizer/tokenizer.json", folder / "tokenizer.json")
    assert main(["--ckpt_dir", str(folder), "--prompt", "Once upon a time"]) == 2
    assert "the tokenizer is not the model's" in capsys.readouterr().err


def test_logits_of_nan_are_told_and_not_sampled(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge(weights: dict[str, torch.Tensor]) -> None:
        weights["transformer.ln_f.weight"].fill_(3e38)  # a number, but not what comes of it

    folder = copied(tiny_checkpoint, tmp_path / "diverged", diverge)
    assert main(["--ckpt_dir", str(folder), "--prompt", "Tom"]) == 1
    assert "error: the model's logits are NaN" in capsys.readouterr().err


# --- real processes -----------------------------------------------------------------------------------------


def start(folder: Path) -> subprocess.Popen[bytes]:
    flags = ["--ckpt_dir", folder, "--prompt", "Tom", "--max_tokens", "4000", "--temperature", "0"]
    command = [sys.executable, ROOT / "generate.py", *flags]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    if (
        os.name == "posix"
    ):  # started in the background, this process ignores Ctrl-C, and children inherit that
        pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)


@pytest.fixture(scope="module")
def expected(chatterbox: Path, llama_style: HFTokenizer) -> str:
    """The beginning of what the processes below say."""
    from litgpt_moe.checkpoints.reader import load_model

    prompt = [1, *llama_style.encode("Tom").ids]
    steps: Iterator[int] = generate(make_decoder(load_model(chatterbox)), prompt, 4000, GREEDY)
    return llama_style.decode(prompt + list(itertools.islice(steps, 30)))


def test_a_closed_pipe_and_ctrl_c_end_quietly_and_keep_the_text(chatterbox: Path, expected: str) -> None:
    closed = start(chatterbox)
    assert closed.stdout is not None and closed.stderr is not None
    assert expected.encode().startswith(closed.stdout.read(20))
    closed.stdout.close()
    interrupted = start(chatterbox)  # one after the other: on a busy machine the second could end meanwhile
    assert interrupted.stdout is not None
    beginning = b""
    while len(beginning) < 20:
        beginning += interrupted.stdout.read(20)
    if os.name == "posix":
        interrupted.send_signal(signal.SIGINT)
    rest, interrupted_log = interrupted.communicate(timeout=60)
    closed_log = closed.stderr.read()
    assert closed.wait(timeout=60) == 0
    assert b"Traceback" not in closed_log + interrupted_log
    assert b"4000 new tokens" not in closed_log
    if os.name == "posix":
        assert interrupted.returncode == 130
        text, told = (beginning + rest).decode(), int(interrupted_log.split(b" new tokens")[0].split()[-1])
        assert text.startswith(expected[:20]) and 0 < told < 4000
        assert len(text) >= told  # no tail is lost: each token is a character or more


@pytest.mark.parametrize(
    ("name", "reason"), [(".", "Is a directory"), ("none.txt", "No such file or directory")]
)
def test_a_prompt_file_that_cannot_be_read_is_told_in_one_sentence(
    tiny_checkpoint: Path, tmp_path: Path, name: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    assert main(["--ckpt_dir", str(tiny_checkpoint), "--prompt_file", str(path)]) == 2
    wanted = f"error: --prompt_file is {path}: {reason}; name a UTF-8 text file that can be read\n"
    if sys.platform != "win32":  # whose words are others
        assert capsys.readouterr().err == wanted


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a device that never ends")
def test_a_prompt_that_never_ends_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--prompt_file", "/dev/zero"]) == 2
    assert capsys.readouterr().err == "error: /dev/zero has over 16,777,216 bytes; shorten the prompt\n"
