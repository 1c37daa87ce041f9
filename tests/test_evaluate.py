"""Tests of evaluate against a plain loop over tokens, sums done by hand, and real shards on disk."""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, alter
from helpers.rows import write_rows

from evaluate import main
from litgpt_moe.cli import command_line
from litgpt_moe.data.tokenizer import read_tokenizer_facts
from litgpt_moe.files import sha256_file
from litgpt_moe.loss import CHUNK_VALUES
from litgpt_moe.scoring import bytes_of_first, split_corpus

pytestmark = pytest.mark.usefixtures("eager")

STORIES = [
    "Tom had a red ball. Tom went to the park and saw a big dog. They were happy.",
    "Lily saw a caf\u00e9 \u2013 it was big!  She was h\u00e4ppy \U0001f600.",
    "Ben had a green boat. " * 6,
    "Mia.",
]


def write_split(data_dir: Path, split: str, stories: list[str], tokenizer_dir: Path) -> dict:
    """Write stories as one shard each, encoded by LitGPT's own tokenizer; returns the manifest's part."""
    from litgpt.tokenizer import Tokenizer

    tokenizer = Tokenizer(tokenizer_dir)
    shards = []
    (data_dir / split / split).mkdir(parents=True)
    for number, story in enumerate(stories):
        ids = tokenizer.encode(story.strip(), bos=True, eos=True).numpy().astype("<u2")
        path = data_dir / split / split / f"{number:05}.bin"
        path.write_bytes(ids.tobytes())
        counts = {"n_tokens": len(ids), "n_stories": 1, "n_bytes": len(story.strip().encode())}
        shards.append({"path": f"{split}/{split}/{path.name}", "sha256": sha256_file(path), **counts})
    totals = {key: sum(shard[key] for shard in shards) for key in ("n_tokens", "n_stories", "n_bytes")}
    return {**totals, "n_duplicates": 0, "n_replaced_bytes": 0, "text": [], "shards": shards}


def write_data(data_dir: Path, tokenizer_dir: Path, val: list[str] = STORIES) -> Path:
    splits = {"train": STORIES[:1], "val": val}
    tokenizer = {
        "sha256": sha256_file(tokenizer_dir / "tokenizer.json"),
        "vocab_size": read_tokenizer_facts(tokenizer_dir).vocab_size,
        "bos_id": 1,
        "eos_id": 2,
    }
    manifest = {
        "format_version": 1,
        "dtype": "uint16",
        "tokenizer": tokenizer,
        "options": {},
        "splits": {
            name: write_split(data_dir, name, stories, tokenizer_dir) for name, stories in splits.items()
        },
    }
    (data_dir / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return data_dir


@pytest.fixture
def data_dir(tmp_path, tiny_tokenizer_dir) -> Path:
    return write_data(tmp_path / "data" / "stories", tiny_tokenizer_dir)


@pytest.fixture
def evaluated(data_dir, tmp_path, tiny_checkpoint, capsys):
    """A function that runs the command on the tiny checkpoint and returns its JSON."""

    def run(*flags: object) -> dict:
        common = ["--ckpt_dir", tiny_checkpoint, "--data_dir", data_dir, "--device", "cpu", "--json"]
        if "--results_file" not in flags:
            common += ["--results_file", tmp_path / "results.jsonl"]
        assert main([*map(str, common), *map(str, flags)]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def failure(capsys, *flags: object, status: int = 2) -> str:
    """Run the command, check its status and that it fails with one line, and return that line."""
    assert main([*map(str, flags), "--device", "cpu"]) == status
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    return captured.err


def all_tokens(data_dir: Path, split: str = "val") -> list[int]:
    """The split's ids, read without our reader."""
    shards = json.loads((data_dir / "manifest.json").read_text(encoding="utf-8"))["splits"][split]["shards"]
    return [i for shard in shards for i in np.fromfile(data_dir / shard["path"], "<u2").tolist()]


def plain_cross_entropy(checkpoint: Path, ids: list[int], window: int) -> float:
    """Mean -log p, one token after another, by stock LitGPT's model in float32 and a float64 log-softmax."""
    from litgpt import GPT, Config

    model = GPT(Config.from_file(checkpoint / "model_config.yaml"))
    model.load_state_dict(torch.load(checkpoint / "lit_model.pth", weights_only=True)["model"])
    nats = []
    with torch.no_grad():
        for position in range(1, len(ids)):
            start = (position - 1) // window * window
            logits = model(torch.tensor([ids[start:position]]))[0, -1].double()
            nats.append(-logits.log_softmax(0)[ids[position]].item())
    return sum(nats) / len(nats)


@pytest.mark.parametrize("flags", [(), ("--max-seq-length", 7, "--batch-size", 3)])
def test_loss_is_that_of_a_plain_loop_over_every_token(evaluated, data_dir, tiny_checkpoint, flags):
    result = evaluated(*flags)
    ids = all_tokens(data_dir)
    assert result["n_tokens"] == len(ids) - 1
    window = result["settings"]["max_seq_length"]
    assert result["loss"] == pytest.approx(plain_cross_entropy(tiny_checkpoint, ids, window), abs=1e-6)


def test_few_logits_at_a_time_give_the_same_loss(evaluated, monkeypatch):
    whole = evaluated()
    monkeypatch.setitem(CHUNK_VALUES, "cpu", 5 * 512)  # five tokens
    assert evaluated()["loss"] == pytest.approx(whole["loss"], abs=1e-7)


def test_memory_that_logits_on_a_cpu_free_is_kept_for_the_next(evaluated, faults_of_new_memory):
    evaluated()
    assert faults_of_new_memory() < 100


def test_bits_per_byte_divides_by_the_bytes_of_the_stories(evaluated):
    result = evaluated()
    n_bytes = sum(len(story.strip().encode()) for story in STORIES)
    assert result["bits_per_byte"] == pytest.approx(result["total_nats"] / math.log(2) / n_bytes, rel=1e-12)


@pytest.mark.parametrize("n_whole", [1, 2, 3])
def test_bytes_of_a_part_are_those_of_its_stories(data_dir, tiny_tokenizer_dir, n_whole):
    corpus = split_corpus(data_dir, "val", tiny_tokenizer_dir)
    ends = [i + 1 for i, token in enumerate(all_tokens(data_dir)) if token == 2]
    wanted = sum(len(story.strip().encode()) for story in STORIES[:n_whole])
    assert bytes_of_first(corpus, ends[n_whole - 1]) == wanted


def test_bytes_of_a_part_grow_with_each_token_to_the_whole(data_dir, tiny_tokenizer_dir):
    corpus = split_corpus(data_dir, "val", tiny_tokenizer_dir)
    counts = [bytes_of_first(corpus, n) for n in range(1, corpus.n_tokens + 1)]
    assert counts[0] == 0 and counts[-1] == corpus.n_bytes
    assert all(before <= after for before, after in pairwise(counts))


def test_max_batches_scores_the_beginning_alone(evaluated, data_dir, tiny_checkpoint):
    result = evaluated("--max_batches", 1, "--batch_size", 1, "--max_seq_length", 10)
    assert result["n_tokens"] == 10
    wanted = plain_cross_entropy(tiny_checkpoint, all_tokens(data_dir)[:11], 10)
    assert result["loss"] == pytest.approx(wanted, abs=1e-6)


def test_more_batches_than_any_machine_counts_are_all_of_them(evaluated):
    assert evaluated("--max_batches", 10**23)["loss"] == evaluated()["loss"]


def test_a_reader_that_leaves_early_ends_nothing_and_the_result_is_recorded(
    data_dir, tiny_checkpoint, tmp_path
):
    flags = ["--ckpt_dir", tiny_checkpoint, "--data_dir", data_dir, "--results_file", tmp_path / "r.jsonl"]
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / "evaluate.py"), *map(str, flags)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Broken" not in done.stderr
    assert (tmp_path / "r.jsonl").is_file()


def test_the_train_split_can_be_scored(evaluated, data_dir):
    assert evaluated("--split", "train")["n_tokens"] == len(all_tokens(data_dir, "train")) - 1


def test_every_routed_token_is_counted_for_two_experts_in_each_layer(evaluated):
    result = evaluated()
    assert list(result["expert_load"]) == ["0", "1"]
    assert [sum(load) for load in result["expert_load"].values()] == [2 * result["n_tokens"]] * 2


def test_text_files_score_like_the_same_stories_in_shards(evaluated, tmp_path):
    shards = evaluated()
    (tmp_path / "a.txt").write_text(f"{STORIES[0]}\n<|endoftext|>\n\n{STORIES[1]}\n", encoding="utf-8")
    rest = f"{STORIES[2]}\r\n<|endoftext|>\r\n{STORIES[3]}\r\n<|endoftext|>\r\n"
    (tmp_path / "b.txt").write_bytes(rest.encode())
    text = evaluated("--text", tmp_path / "a.txt", "--text", tmp_path / "b.txt")
    assert {key: text[key] for key in ("loss", "n_tokens", "n_bytes")} == {
        key: shards[key] for key in ("loss", "n_tokens", "n_bytes")
    }


def test_text_in_rows_scores_like_the_same_stories_in_plain_text(evaluated, tmp_path):
    text = write_rows(tmp_path / "a.txt", STORIES)
    expected = evaluated("--text", text)
    for name in ("a.jsonl.gz", "a.JSON", "a.csv", "a.tsv.xz", "a.parquet.zst"):
        flags = ["--text", write_rows(tmp_path / name, STORIES, "story"), "--text_column", "story"]
        rows = evaluated(*flags)
        assert (rows["loss"], rows["n_bytes"]) == (expected["loss"], expected["n_bytes"]), name
        assert rows["data"]["text"][0]["column"] == "story"
    assert expected["data"]["text"] == [{"path": str(text), "sha256": sha256_file(text)}]


def test_rows_without_a_text_column_are_one_sentence(tmp_path, tiny_checkpoint, capsys):
    text = write_rows(tmp_path / "a.jsonl", STORIES, "story")
    flags = ["--ckpt_dir", tiny_checkpoint, "--text", text, "--text_column", "tale"]
    assert "has no column 'tale' but 'id', 'story'" in failure(capsys, *flags)
    assert "give --text too" in failure(capsys, "--text_column", "tale")


def test_text_needs_no_prepared_data(tmp_path, tiny_checkpoint, capsys):
    (tmp_path / "a.txt").write_text("Tom saw a dog.", encoding="utf-8")
    flags = ["--text", tmp_path / "a.txt", "--data_dir", tmp_path / "none", "--results_file", "none"]
    assert main(["--ckpt_dir", str(tiny_checkpoint), "--device", "cpu", *map(str, flags)]) == 0
    assert "a.txt" in capsys.readouterr().out


def test_each_result_is_one_line_with_the_checkpoints_identity(evaluated, tmp_path, tiny_checkpoint):
    printed = [evaluated(), evaluated("--max_batches", 1)]
    lines = (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == printed
    checkpoint = printed[0]["checkpoint"]
    assert checkpoint["sha256"] == sha256_file(tiny_checkpoint / "lit_model.pth")
    assert checkpoint["path"] == str(tiny_checkpoint) and printed[0]["random_weights"] is False


def test_results_go_to_the_current_folder_and_beside_the_checkpoint_by_a_flag(
    data_dir, tmp_path, tiny_checkpoint, monkeypatch
):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "run" / "step-00000100")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    flags = ["--ckpt_dir", "../run", "--data_dir", str(data_dir), "--device", "cpu", "--max_batches", "1"]
    assert main(flags) == 0
    assert not (tmp_path / "run" / "results.jsonl").exists()
    row = json.loads(Path("results.jsonl").read_text(encoding="utf-8"))
    assert Path(row["checkpoint"]["path"]).is_absolute()
    assert Path(row["checkpoint"]["path"]).resolve() == folder
    assert main([*flags, "--results_file", "beside"]) == 0
    assert len((tmp_path / "run" / "results.jsonl").read_text(encoding="utf-8").splitlines()) == 1


@pytest.mark.skipif(os.name != "posix", reason="links need a right on Windows")
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe"])
@pytest.mark.parametrize("place", ["beside", "results.jsonl"])
def test_results_are_not_written_through_a_link(
    kind, place, data_dir, tmp_path, tiny_checkpoint, monkeypatch, capsys
):
    target, run = tmp_path / "bashrc", tmp_path / "run"
    shutil.copytree(tiny_checkpoint, run / "final")
    monkeypatch.chdir(run)
    if kind == "pipe":
        os.mkfifo("results.jsonl")
    else:
        Path("results.jsonl").symlink_to(target)
    if kind == "link":
        target.write_text("mine\n", encoding="utf-8")
    flags = ["--ckpt_dir", str(run), "--data_dir", str(data_dir), "--max_batches", "1", "--device", "cpu"]
    # found before the scoring where the flag names the file
    assert main([*flags, "--results_file", place]) == (1 if place == "beside" else 2)
    told = "results.jsonl: not recorded (" if place == "beside" else "error: results.jsonl is "
    assert told in capsys.readouterr().err
    assert target.exists() == (kind == "link") and (kind != "link" or target.read_text() == "mine\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk to write to")
def test_a_result_that_cannot_be_printed_is_recorded(evaluated, tmp_path, monkeypatch):
    (tmp_path / "results.jsonl").write_text('{"torn": ', encoding="utf-8")
    with Path("/dev/full").open("w", encoding="utf-8") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        with pytest.raises(AssertionError):
            evaluated("--max_batches", 1)
        with contextlib.suppress(OSError):
            full.close()
    torn, row = (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert torn == '{"torn": ' and json.loads(row)["loss"] > 0


def test_the_command_that_is_printed_quotes_a_name_that_a_shell_would_run(
    data_dir, tmp_path, tiny_checkpoint
):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "a$(touch x)b")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="another tokenizer") as raised:
        split_corpus(data_dir, "val", folder)
    assert command_line("prepare_data.py", "--tokenizer_dir", folder) in str(raised.value)
    assert f"'{folder}'" in str(raised.value) or os.name == "nt"


def test_the_table_shows_loss_and_the_load_of_each_layer(data_dir, tiny_checkpoint, capsys):
    flags = [
        "--ckpt_dir",
        tiny_checkpoint,
        "--data_dir",
        data_dir,
        "--device",
        "cpu",
        "--results_file",
        "none",
    ]
    assert main([*map(str, flags)]) == 0
    out = capsys.readouterr().out
    assert "nats per token" in out and "bits per byte" in out
    assert out.count("(expert ") == 4  # least and most used, in two layers


@pytest.fixture
def workplace(tmp_path, tiny_tokenizer_dir, tiny_checkpoint, monkeypatch) -> Path:
    """A folder as after prepare_data, before training: data, tokenizer, model_config.yaml, no checkpoint."""
    write_data(tmp_path / "data" / "custom_text", tiny_tokenizer_dir)
    shutil.copytree(tiny_tokenizer_dir, tmp_path / "data" / "tokenizer")
    shutil.copy(tiny_checkpoint / "model_config.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_a_checkpoint_random_weights_are_scored_and_marked(workplace, capsys):
    assert main(["--json", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert "Warning: Evaluating random weights!" in captured.err.splitlines()
    result = json.loads(captured.out)
    assert result["random_weights"] is True and result["checkpoint"] is None
    assert result["loss"] == pytest.approx(math.log(512), abs=0.3)  # LitGPT starts training near there


def test_random_weights_are_the_same_for_the_same_seed(workplace, capsys):
    losses = []
    for seed in ("1", "1", "2"):
        assert main(["--random-weights", "--seed", seed, "--json", "--device", "cpu"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_random_weights_of_a_text_take_the_tokenizer_beside_the_data(workplace, capsys):
    (workplace / "a.txt").write_text("Tom saw a dog.", encoding="utf-8")
    assert main(["--text", "a.txt", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["n_bytes"] == 14


def test_a_named_checkpoint_that_is_not_there_is_an_error(tmp_path, capsys):
    assert str(tmp_path / "none") in failure(capsys, "--ckpt_dir", tmp_path / "none")


def test_missing_data_is_one_sentence(tmp_path, tiny_checkpoint, capsys):
    error = failure(capsys, "--ckpt_dir", tiny_checkpoint, "--data_dir", tmp_path / "none")
    assert str(tmp_path / "none") in error and "prepare_data.py" in error


def test_a_truncated_shard_is_one_sentence(data_dir, tiny_checkpoint, capsys):
    path = data_dir / "val" / "val" / "00001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    assert str(path) in failure(capsys, "--ckpt_dir", tiny_checkpoint, "--data_dir", data_dir)


def test_a_shard_altered_at_equal_size_and_time_is_one_sentence(data_dir, tiny_checkpoint, capsys):
    alter(next(data_dir.glob("val/val/00002.bin")), 10)
    error = failure(capsys, "--ckpt_dir", tiny_checkpoint, "--data_dir", data_dir)
    assert "00002.bin: altered since it was made" in error


def test_a_changed_text_is_refused(data_dir, tiny_checkpoint, capsys):
    (data_dir / "val" / "new.txt").write_text("One more story.", encoding="utf-8")
    error = failure(capsys, "--ckpt_dir", tiny_checkpoint, "--data_dir", data_dir)
    assert "new.txt" in error and "prepare_data.py" in error


def test_data_of_another_tokenizer_are_refused(data_dir, tmp_path, tiny_checkpoint, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    with (other / "tokenizer.json").open("a", encoding="utf-8") as file:
        file.write("\n")
    assert "another tokenizer" in failure(capsys, "--ckpt_dir", other, "--data_dir", data_dir)


def test_a_vocabulary_larger_than_the_model_is_refused(workplace, tiny_config, capsys):
    from litgpt.utils import save_config

    tiny_config.padded_vocab_size = tiny_config.vocab_size = 128
    save_config(tiny_config, workplace)
    assert main(["--device", "cpu"]) == 2
    assert "395 pieces but MoE-tiny knows 128" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(data_dir, tmp_path, tiny_checkpoint, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    config = other / "model_config.yaml"
    config.write_text(
        config.read_text(encoding="utf-8").replace("n_layer: 2", "n_layer: 3"), encoding="utf-8"
    )
    assert "transformer.h.2." in failure(capsys, "--ckpt_dir", other, "--data_dir", data_dir)


def test_a_validation_split_without_tokens_is_one_sentence(
    tmp_path, tiny_tokenizer_dir, tiny_checkpoint, capsys
):
    data_dir = write_data(tmp_path / "data", tiny_tokenizer_dir, val=[])
    assert "val split has 0 tokens" in failure(capsys, "--ckpt_dir", tiny_checkpoint, "--data_dir", data_dir)


def test_a_text_file_without_text_is_one_sentence(tmp_path, tiny_checkpoint, capsys):
    (tmp_path / "a.txt").write_text(" \n", encoding="utf-8")
    assert "holds no text" in failure(capsys, "--ckpt_dir", tiny_checkpoint, "--text", tmp_path / "a.txt")


def test_a_text_file_that_is_not_there_is_one_sentence(tmp_path, tiny_checkpoint, capsys):
    assert str(tmp_path / "a.txt") in failure(
        capsys, "--ckpt_dir", tiny_checkpoint, "--text", tmp_path / "a.txt"
    )


@pytest.mark.skipif(os.name != "posix", reason="named pipes and /dev/null are POSIX's")
def test_what_is_no_text_file_is_told_as_what_it_is(tmp_path, tiny_checkpoint, capsys):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty.txt").touch()
    for path, words in {
        tmp_path: "is a folder; name a text file in it",
        tmp_path / "pipe": "is a device, pipe or socket; save its text to a file",
        Path("/dev/null"): "is a device, pipe or socket; save its text to a file",
        tmp_path / "empty.txt": "holds no text; name a UTF-8 text file with at least one word",
    }.items():
        text = failure(capsys, "--ckpt_dir", tiny_checkpoint, "--text", path)
        assert str(path) in text and words in text


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--batch_size", 0, "1 or more"),
        ("--max_batches", 0, "1 or more"),
        ("--max_seq_length", 65, "at most 64"),
        ("--seed", 10**20, "below 2**63"),
    ],
)
def test_a_number_out_of_range_is_one_sentence(data_dir, tiny_checkpoint, capsys, flag, value, words):
    error = failure(capsys, "--ckpt_dir", tiny_checkpoint, "--data_dir", data_dir, flag, value)
    assert f"{flag} is {value}" in error and words in error


def test_an_unknown_device_is_one_sentence(tiny_checkpoint, capsys):
    assert main(["--ckpt_dir", str(tiny_checkpoint), "--device", "abacus"]) == 2
    assert "--device abacus cannot be used here (torch knows no such device)" in capsys.readouterr().err


def test_an_unknown_precision_is_one_sentence(tiny_checkpoint, capsys):
    assert main(["--ckpt_dir", str(tiny_checkpoint), "--precision", "8-true"]) == 2
    assert "--precision 8-true is unknown; choose auto, 32-true" in capsys.readouterr().err


def test_a_loss_that_is_not_a_number_is_a_failure_not_a_result(data_dir, tmp_path, tiny_checkpoint, capsys):
    broken = tmp_path / "run" / "final"
    shutil.copytree(tiny_checkpoint, broken)
    state = torch.load(broken / "lit_model.pth", weights_only=True)
    state["model"]["lm_head.weight"].fill_(3e38)  # a number, but not what comes of it
    torch.save(state, broken / "lit_model.pth")
    assert "the loss is nan" in failure(capsys, "--ckpt_dir", broken, "--data_dir", data_dir, status=1)
    assert not (tmp_path / "run" / "results.jsonl").exists()


def test_bfloat16_differs_little_from_float32(evaluated):
    exact, rounded = evaluated(), evaluated("--precision", "bf16-true")
    assert rounded["settings"]["dtype"] == "bfloat16"
    assert rounded["loss"] != exact["loss"] and rounded["loss"] == pytest.approx(exact["loss"], abs=0.02)


def test_a_results_file_that_cannot_be_written_is_named(data_dir, tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "results.jsonl"
    flags = ("--ckpt_dir", tiny_checkpoint, "--data_dir", data_dir, "--results_file", place)
    assert main([str(flag) for flag in flags]) == 1
    output = capsys.readouterr()
    assert f"error: {place}: not recorded" in output.err
    assert "perplexity" in output.out  # the figures are not lost


@pytest.mark.parametrize(
    "content", ["Once upon a time.\n", "PK\x03\x04 weights", "[1]\n", '{"version": "1.0"}', "{\n}"]
)
def test_no_row_is_appended_to_a_file_of_something_else(
    content: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "somebody's"
    path.write_text(content, encoding="utf-8")
    (tmp_path / "a.txt").write_text("Once upon a time.", encoding="utf-8")
    flags = ["--ckpt_dir", tiny_checkpoint, "--text", tmp_path / "a.txt", "--results_file"]
    assert main([str(flag) for flag in [*flags, path]]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "holds something else than results; name another" in captured.err
    assert path.read_text(encoding="utf-8") == content
    assert main([str(flag) for flag in [*flags, tmp_path]]) == 2
    assert f"{tmp_path} is a folder; name a file" in capsys.readouterr().err


def test_a_checkpoint_is_scored_on_the_data_that_it_was_trained_on(
    tiny_checkpoint: Path, tiny_tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "mine", tiny_tokenizer_dir)
    shutil.copytree(tiny_checkpoint, "run/final")
    settings = "data:\n  init_args:\n    train_data_path: data/custom_text/train\n"
    Path("run/final/train_config.yaml").write_text(f"dataset_dir: mine\n{settings}", encoding="utf-8")
    Path("run/final/checkpoint.json").unlink(missing_ok=True)
    assert main(["--ckpt_dir", "run"]) == 0
    assert json.loads(Path("results.jsonl").read_text(encoding="utf-8"))["data"]["data_dir"] == "mine"


def test_eight_bits_are_scored_as_rounded_weights(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Tom had a red ball. Tom went to the park. " * 5, encoding="utf-8")

    def evaluated(*flags: str) -> dict:
        base = ["--ckpt_dir", str(tiny_checkpoint), "--text", str(text), "--json", "--results_file", "none"]
        assert main([*base, *flags]) == 0
        return json.loads(capsys.readouterr().out)

    exact, rounded = evaluated(), evaluated("--quantize", "int8")
    assert 0 < abs(exact["loss"] - rounded["loss"]) < 0.02
    assert rounded["settings"] == exact["settings"] | {"quantize": "int8"}


def test_the_loss_is_kept_when_the_pairs_cannot_be_scored(tmp_path, data_dir, tiny_checkpoint, capsys):
    (tmp_path / "a.jsonl").write_bytes(b'{"sentence_good": "Tom", "sentence_bad": "%s"}' % (b"Tom " * 70))
    flags = ["--ckpt_dir", tiny_checkpoint, "--data_dir", data_dir, "--blimp", tmp_path]
    results = tmp_path / "results.jsonl"
    assert main(["--device=cpu", f"--results_file={results}", *map(str, flags)]) == 1
    out, err = capsys.readouterr()
    assert "nats per token" in out and "over the block_size of 64" in err
    assert json.loads(results.read_text(encoding="utf-8"))["loss"] > 0
