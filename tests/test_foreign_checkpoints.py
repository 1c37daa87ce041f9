"""Odd checkpoints in generate, evaluate, the server and the tools: one sentence, and a whole terminal."""

import io
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
import torch
import yaml
from helpers.server import complete, serving
from litgpt.tokenizer import Tokenizer

import evaluate
import generate
from litgpt_moe import scoring
from litgpt_moe.checkpoints.reader import load_model, load_tokenizer
from litgpt_moe.cli import printable, run_command
from litgpt_moe.generation.settings import Sampling
from litgpt_moe.generation.text import AsyncTokenStreamer, encode, tell_story
from tools import export_hf, inspect_checkpoint, inspect_routing

pytestmark = pytest.mark.usefixtures("eager")
RETRIES = "x" * 40 + " "  # the pattern below tries more ways to match it than Oniguruma allows
STUCK = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
CUT = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 2}


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to spoil, which has no digests."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "foreign")
    (folder / "checkpoint.json").unlink(missing_ok=True)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Tom saw a dog. " * 20 + RETRIES, encoding="utf-8")
    return path


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    content = {key: value for key, value in (content | changes).items() if value is not ...}
    path.write_text(json.dumps(content), encoding="utf-8")


def fill(folder: Path, name: str, value: float) -> None:
    """Set every value of a weight."""
    state = torch.load(folder / "lit_model.pth", weights_only=True)
    state["model"][name].fill_(value)
    torch.save(state, folder / "lit_model.pth")


COMMANDS: dict[str, Callable[[Path, Path], int]] = {
    "generate": lambda folder, text: generate.main(
        [f"--ckpt_dir={folder}", "--prompt=Tom", "--max_tokens=3", "--seed=1"]
    ),
    "evaluate": lambda folder, text: evaluate.main(
        [f"--ckpt_dir={folder}", f"--text={text}", "--results_file=none"]
    ),
    "inspect": lambda folder, text: inspect_checkpoint.main([str(folder)]),
    "routing": lambda folder, text: inspect_routing.main([str(folder), str(text), f"--out={folder}/out"]),
    "export": lambda folder, text: export_hf.main([str(folder), f"{folder}/out", "--no_check"]),
}


def assert_one_sentence(status: int, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status in (1, 2) and len(errors) == 1, errors
    for word in words:
        assert word in errors[0]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("value", ["-1", "[1, 2]", "1e400", "4e9", "4000000000", "true", '"<s>"', "99999"])
@pytest.mark.parametrize("key", ["bos", "eos"])
def test_ids_that_are_no_ids_are_refused(
    key: str, value: str, command: str, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json(checkpoint / "tokenizer_config.json", **{f"{key}_token": ...})
    (checkpoint / "generation_config.json").write_text(f'{{"{key}_token_id": {value}}}', encoding="utf-8")
    assert_one_sentence(COMMANDS[command](checkpoint, text), capsys, key)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_token_that_is_no_text_is_refused(
    command: str, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json(checkpoint / "tokenizer_config.json", eos_token=10**39, tokenizer_class=...)
    assert_one_sentence(COMMANDS[command](checkpoint, text), capsys)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("content", ["null", "1", '[""]', '"a"'])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_a_tokenizer_s_file_that_holds_no_object_is_refused(
    name: str, content: str, command: str, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # LitGPT looks into the second file for what the first lacks
    edit_json(checkpoint / "tokenizer_config.json", eos_token=...)
    (checkpoint / name).write_text(content, encoding="utf-8")
    assert_one_sentence(COMMANDS[command](checkpoint, text), capsys, "tokenizer")


def test_a_prompt_longer_than_the_sliding_window_is_refused_before_it_is_shown(
    checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / "model_config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    window = {"sliding_window_size": 2, "sliding_window_indices": [1] * config["n_layer"]}
    path.write_text(yaml.dump(config | window), encoding="utf-8")
    prompt = "Tom had a red ball and a dog"
    assert generate.main([f"--ckpt_dir={checkpoint}", f"--prompt={prompt}", "--max_tokens=3"]) == 2
    out, err = capsys.readouterr()
    assert "tokens but the model's sliding_window_size is 2; shorten it" in err and prompt not in out
    told = tell_story(
        load_model(checkpoint), load_tokenizer(checkpoint), prompt, 3, Sampling(temperature=0), seed=0
    )
    assert told.startswith("(none: the prompt has")  # training goes on


def odd_weights() -> dict[str, dict]:
    values = torch.ones(2, 2)
    return {
        "number": {7: values},
        "nested": {"a": torch.nested.nested_tensor([values, values])},
        "sparse": {"a": values.to_sparse()},
        "meta": {"a": values.to("meta")},
        "quantized": {"a": torch.quantize_per_tensor(values, 0.1, 0, torch.qint8)},
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", ["generate", "inspect", "export"])
@pytest.mark.parametrize("kind", odd_weights())
@pytest.mark.parametrize("where", ["model", "optimizer"])
def test_weights_that_are_no_plain_named_tensors_are_refused(
    where: str, kind: str, command: str, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if where == "optimizer" and kind == "number":
        pytest.skip("torch numbers the weights of an optimizer")
    state = torch.load(checkpoint / "lit_model.pth", weights_only=True)
    state.setdefault(where, {}).update(odd_weights()[kind])
    torch.save(state, checkpoint / "lit_model.pth")
    assert_one_sentence(COMMANDS[command](checkpoint, text), capsys, "lit_model.pth")


def test_a_tokenizer_without_a_class_is_used(checkpoint: Path, text: Path) -> None:
    edit_json(checkpoint / "tokenizer_config.json", tokenizer_class=...)  # as GPT-2's on the hub
    assert [COMMANDS[command](checkpoint, text) for command in ("generate", "export", "inspect")] == [0] * 3


def test_a_tokenizer_that_adds_a_bos_it_lacks_is_refused(
    checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json(checkpoint / "tokenizer_config.json", bos_token=...)
    (checkpoint / "generation_config.json").unlink()
    assert_one_sentence(
        COMMANDS["generate"](checkpoint, text), capsys, "adds BOS (add_bos_token) but has none"
    )


@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer"])
def test_a_tokenizer_that_panics_is_one_sentence(
    part: str, checkpoint: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    replace = {"type": "Replace", "pattern": STUCK["pattern"], "content": ""}
    edit_json(checkpoint / "tokenizer.json", **{part: STUCK if part == "pre_tokenizer" else replace})
    flags = [f"--ckpt_dir={checkpoint}", f"--prompt={RETRIES}", "--max_tokens=3"]
    assert_one_sentence(generate.main(flags), capfd, "retry-limit")
    assert_one_sentence(COMMANDS["evaluate"](checkpoint, text), capfd, "retry-limit")
    assert_one_sentence(COMMANDS["routing"](checkpoint, text), capfd, "retry-limit")
    with serving(checkpoint) as server:
        with pytest.raises(openai.BadRequestError, match="retry-limit"):
            complete(server, RETRIES)
        assert complete(server, "Tom", max_tokens=3).usage.completion_tokens == 3
    story = tell_story(
        load_model(checkpoint), load_tokenizer(checkpoint), RETRIES, 3, Sampling(temperature=0), seed=0
    )
    assert story.startswith("(none: the tokenizer: it fails")  # training goes on


def test_a_normalizer_that_multiplies_a_prompt_is_refused(
    checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 60}] * 6
    edit_json(checkpoint / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": steps})
    assert_one_sentence(COMMANDS["generate"](checkpoint, text), capsys, "normalizer")
    assert_one_sentence(COMMANDS["evaluate"](checkpoint, text), capsys, "normalizer")


def test_truncation_in_a_tokenizer_does_not_cut_a_prompt(checkpoint: Path, tiny_checkpoint: Path) -> None:
    edit_json(checkpoint / "tokenizer.json", truncation=CUT)
    prompt = "Tom had a red ball and a dog"
    assert encode(load_tokenizer(checkpoint), prompt) == Tokenizer(tiny_checkpoint).encode(prompt).tolist()


def test_the_ids_of_a_prompt_are_litgpts(tiny_checkpoint: Path) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint)
    for prompt in ("", "Tom", " Tom  saw\n\n a <s> dog</s>", "caf\u00e9 \U0001f600"):
        assert encode(tokenizer, prompt) == Tokenizer(tiny_checkpoint).encode(prompt).tolist()


def test_other_threads_go_on_while_a_long_prompt_is_tokenized(tiny_checkpoint: Path) -> None:
    tokenizer, prompt, begun = load_tokenizer(tiny_checkpoint), "Tom saw a dog. " * 20_000, threading.Event()

    def work() -> None:
        begun.set()
        encode(tokenizer, prompt)

    thread, turns = threading.Thread(target=work), 0
    thread.start()
    begun.wait()
    while thread.is_alive():
        thread.join(0.001)
        turns += 1
    assert turns > 5  # two, while the library holds the GIL


@pytest.mark.parametrize("value", [1e37, -1e37])
@pytest.mark.parametrize("flags", [["--temperature=0.001"], ["--repetition_penalty=1e30", "--top_p=0.5"]])
def test_logits_near_the_largest_number_are_sampled(
    flags: list[str], value: float, checkpoint: Path, text: Path
) -> None:
    fill(checkpoint, "lm_head.weight", value)
    assert generate.main([f"--ckpt_dir={checkpoint}", "--prompt=Tom", "--max_tokens=3", *flags]) == 0


@pytest.mark.parametrize("name", ["transformer.h.0.norm_1.weight", "transformer.h.0.mlp.gate.weight"])
@pytest.mark.parametrize("command", ["generate", "evaluate", "routing"])
def test_infinity_from_finite_weights_is_one_sentence(
    command: str, name: str, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(checkpoint, name, 3e38)
    assert_one_sentence(COMMANDS[command](checkpoint, text), capsys)
    assert not (checkpoint / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_whose_name_is_not_utf8_is_one_sentence(
    command: str, checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    shutil.copytree(checkpoint, odd)
    assert_one_sentence(COMMANDS[command](odd, text), capsys, r"caf\udce9", "the name is not UTF-8")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_text_whose_name_is_not_utf8_is_read(checkpoint: Path, text: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(text) + b"\xe9"))
    text.rename(odd)
    assert COMMANDS["evaluate"](checkpoint, odd) == 0
    assert COMMANDS["routing"](checkpoint, odd) == 0
    named = json.loads((checkpoint / "out/routing.json").read_text(encoding="utf-8"))["text"]
    assert named.endswith(r"text.txt\udce9")


# --- the terminal -------------------------------------------------------------------------------------------

ESCAPES = "\x1b[2J\x1b]0;owned\x07 \x9b31m \u202etxt"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("kind", "is_escaped"), [(Terminal, True), (io.StringIO, False)])
def test_a_story_cannot_command_the_terminal_and_a_pipe_gets_it_raw(
    kind: type[io.StringIO], is_escaped: bool, tiny_checkpoint: Path
) -> None:
    tokenizer, out = load_tokenizer(tiny_checkpoint), kind()
    story = f"Tom {ESCAPES}\n\tcaf\u00e9"
    with AsyncTokenStreamer(tokenizer.processor, out) as streamer:
        for token_id in encode(tokenizer, story):
            streamer.put(token_id)
    escaped = r"Tom \x1b[2J\x1b]0;owned\x07 \x9b31m \u202etxt" + "\n\tcaf\u00e9"
    assert out.getvalue() == (escaped if is_escaped else story)


@pytest.mark.parametrize("command", COMMANDS)
def test_names_in_a_checkpoint_cannot_command_the_terminal(
    command: str, checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / "model_config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.dump(config | {"name": ESCAPES}), encoding="utf-8")
    (checkpoint / "train_config.yaml").write_text(yaml.dump({"seed": ESCAPES}), encoding="utf-8")
    (checkpoint / "a\x1b[2Jb").touch()
    assert COMMANDS[command](checkpoint, text) == 0
    captured = capsys.readouterr()
    assert printable(captured.out) == captured.out and printable(captured.err) == captured.err
    assert command != "inspect" or (r"a\x1b[2Jb" in captured.out and r"\x1b]0;owned" in captured.out)


# --- memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", [lambda: torch.empty(1 << 60), lambda: bytearray(1 << 60)])
def test_memory_that_is_not_enough_is_one_sentence(
    ask: Callable[[], object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(ask) == 1
    assert "error: out of memory (" in capsys.readouterr().err


def test_another_error_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        run_command(lambda: torch.ones(3).view(2))


def test_memory_for_a_batch_that_is_not_enough_names_the_flag(
    checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scoring, "window_nats", lambda *_: torch.empty(1 << 60))
    assert_one_sentence(COMMANDS["evaluate"](checkpoint, text), capsys, "no memory for --batch_size 8")
