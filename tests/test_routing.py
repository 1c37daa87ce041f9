"""Routing and its tool: figures against those worked out by hand, and routing that was built to be known."""

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SENTENCES, TINY_CONFIG
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer
from litgpt.utils import copy_config_files, save_config

from litgpt_moe import routing
from litgpt_moe.balance import count_expert_load, expert_load
from litgpt_moe.checkpoints.reader import load_model
from litgpt_moe.config import MoEConfig
from tools import inspect_routing


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Ten short stories."""
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(SENTENCES * 2), encoding="utf-8")
    return path


@pytest.fixture
def by_token(tmp_path: Path, tiny_tokenizer_dir: Path) -> Path:
    """A checkpoint whose token i goes to expert i % 4 first and to expert (i + 1) % 4 then, in both layers.

    The embedding says so in two columns, attention and experts add nothing, and both routers read it.
    """
    config = MoEConfig(**TINY_CONFIG)
    torch.manual_seed(1)
    model = GPT(config).requires_grad_(False)
    first = torch.arange(512) % 4
    model.transformer.wte.weight.zero_()
    model.transformer.wte.weight[torch.arange(512), first] = 2.0
    model.transformer.wte.weight[torch.arange(512), (first + 1) % 4] = 1.0
    for block in model.transformer.h:
        block.attn.proj.weight.zero_()
        block.mlp.gate.weight.copy_(torch.eye(4, 16))
        for expert in block.mlp.experts:
            expert.proj.weight.zero_()
    folder = tmp_path / "by_token"
    folder.mkdir()
    torch.save(model.state_dict(), folder / "lit_model.pth")
    save_config(config, folder)
    copy_config_files(tiny_tokenizer_dir, folder)
    return folder


def run(checkpoint: Path, text: Path, *flags: object) -> int:
    return inspect_routing.main([str(checkpoint), str(text), *map(str, flags)])


def test_entropy_and_mutual_information_are_those_worked_out_by_hand() -> None:
    assert routing.entropy(np.array([2, 0, 2, 4])) == pytest.approx(1.5 * math.log(2))
    a = np.arange(8000) % 4
    assert routing.mutual_information(a, a // 2) == pytest.approx(math.log(2), abs=0.002)
    assert routing.mutual_information(a, 7 - a) == pytest.approx(math.log(4), abs=0.002)


def test_what_chance_gives_is_taken_off() -> None:
    random = np.random.default_rng(5)
    words, experts = random.integers(300, size=2000), random.integers(8, size=2000)
    # without it, 300 kinds seen 7 times each would seem to tell about 300 * 8 / (2 * 2000) nats
    assert routing.mutual_information(words, experts) < 0.02


def test_choices_are_the_models_own(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    ids = np.random.default_rng(0).integers(512, size=150)  # two whole windows and a short one
    experts, weights = routing.record_choices(model, ids)
    count_expert_load(model, True)
    with torch.inference_mode():
        for start in (0, 64, 128):
            model(torch.from_numpy(ids[None, start : start + 64]))
    for layer, counts_E in expert_load(model).items():
        assert np.bincount(experts[layer].ravel(), minlength=4).tolist() == counts_E.tolist()
        assert weights[layer].shape == (150, 2)
        assert (weights[layer][:, 0] >= weights[layer][:, 1]).all()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_routing_by_token_is_seen_as_such(by_token: Path, text: Path, tmp_path: Path) -> None:
    assert run(by_token, text, "--out", tmp_path / "out") == 0
    content = json.loads((tmp_path / "out" / "routing.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer(by_token)
    ids = np.concatenate([tokenizer.encode(story, eos=True).numpy() for story in SENTENCES * 2])
    assert content["n_tokens"] == len(ids)
    share = (np.bincount(ids % 4, minlength=4) + np.bincount((ids + 1) % 4, minlength=4)) / (2 * len(ids))
    for layer in content["layers"]:
        assert [expert["share"] for expert in layer["experts"]] == pytest.approx(share.tolist())
        assert layer["load_imbalance"] == pytest.approx(4 * share.max())
        for e, expert in enumerate(layer["experts"]):
            for token in expert["typical"]:
                number = tokenizer.processor.token_to_id(token["piece"])
                assert number % 4 in (e, (e - 1) % 4)
                assert (token["share"], token["count"]) == (1.0, int((ids == number).sum()))
    same, other = content["overlap"][0]
    assert same == 1.0 and other > 0.9  # less what chance gives
    assert other == content["overlap"][1][0]


def test_typical_tokens_are_those_that_tell_most() -> None:
    counts_TE = np.array([[90, 10], [10, 90], [50, 50], [4, 0]])  # of tokens 5, 6, 7, 8 with K = 1
    typical = routing.typical_tokens(counts_TE, 0, np.array([5, 6, 7, 8]), 1, str)
    assert [token["piece"] for token in typical] == ["5", "8"]  # 7 goes anywhere, 6 elsewhere
    assert [token["share"] for token in typical] == [0.9, 1.0]
    assert [token["count"] for token in typical] == [90, 4]


def test_table_picture_and_next_step(
    tiny_checkpoint: Path, text: Path, tmp_path: Path, run_script: Callable
) -> None:
    from matplotlib.image import imread

    text.write_text(text.read_text(encoding="utf-8") + " \u65e5\u672c $x$ \U0001f431 $", encoding="utf-8")
    flags = ("--out", tmp_path / "out", "--layer", 1)
    done = run_script("tools/inspect_routing.py", tiny_checkpoint, text, *flags)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split("  ")[0] == "layer" and "layer 1: what each expert takes" in done.stdout
    assert str(tmp_path / "out" / "routing.png") in lines[-2] and lines[-1].startswith("Next: ")
    picture = imread(tmp_path / "out" / "routing.png")
    assert picture.shape[0] > 500 and picture.shape[1] > 1000
    assert picture[..., :3].std() > 0.05  # something is drawn
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"routing.json", "routing.png"}


def test_dense_layers_first_and_many_experts_are_drawn(
    tmp_path: Path, text: Path, tiny_tokenizer_dir
) -> None:
    changes = {"n_expert": 48, "n_expert_per_token": 3, "first_k_dense_replace": 1, "intermediate_size": 8}
    config = MoEConfig(**{**TINY_CONFIG, **changes})
    torch.save(GPT(config).state_dict(), tmp_path / "lit_model.pth")
    save_config(config, tmp_path)
    copy_config_files(tiny_tokenizer_dir, tmp_path)
    assert run(tmp_path, text, "--out", tmp_path / "out", "--max_tokens", 150) == 0
    content = json.loads((tmp_path / "out" / "routing.json").read_text(encoding="utf-8"))
    assert [layer["index"] for layer in content["layers"]] == [1]
    assert len(content["layers"][0]["experts"]) == 48 and content["n_tokens"] == 150


def test_bad_input_ends_in_one_sentence(
    tiny_checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "routing.json").write_text("{}")
    for checkpoint, path, flags, told in (
        (tmp_path / "none", text, (), "no such checkpoint directory"),
        (tmp_path, text, (), "holds no lit_model.pth"),
        (tiny_checkpoint, tmp_path / "none.txt", (), "none.txt: no such text file"),
        (tiny_checkpoint, tmp_path / "empty.txt", (), "holds no text"),
        (tiny_checkpoint, text, ("--layer", 2), "layer is 2; "),
        (tiny_checkpoint, text, ("--max_tokens", 1), "max_tokens is 1; choose 2 or more"),
        (tiny_checkpoint, text, ("--out", tmp_path / "taken"), "routing.json exists; add --overwrite"),
        (tiny_checkpoint, text, ("--out", tmp_path / "taken", "--overwrite"), "and is no earlier result"),
        (tiny_checkpoint, text, ("--out", text), "is a file; name a folder"),
        (tiny_checkpoint, text, ("--device", "nowhere"), "--device nowhere cannot be used"),
    ):
        given = flags if "--out" in flags else (*flags, "--out", tmp_path / "out")
        assert run(checkpoint, path, *given) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and told in line
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_in_one_sentence(
    tiny_checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run(tiny_checkpoint, text, "--out", tmp_path / "out") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "the disk is full; make room there" in line
    assert list((tmp_path / "out").iterdir()) == []


def test_a_dense_model_has_nothing_to_inspect(
    tmp_path: Path, text: Path, tiny_tokenizer_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    dense = {"mlp_class_name": "LLaMAMLP", "intermediate_size": 8, "n_expert": 0, "n_expert_per_token": 0}
    config = MoEConfig(**{**TINY_CONFIG, **dense, "moe_intermediate_size": None})
    torch.save(GPT(config).state_dict(), tmp_path / "lit_model.pth")
    save_config(config, tmp_path)
    copy_config_files(tiny_tokenizer_dir, tmp_path)
    assert run(tmp_path, text) == 2
    assert "the model has no experts" in capsys.readouterr().err
