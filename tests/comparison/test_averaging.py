"""The mean of checkpoints: its values, what is refused, and what it can be used for."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_CONFIG
from helpers import runs
from litgpt.model import GPT
from litgpt.utils import copy_config_files, save_config

from evaluate import main as evaluate
from litgpt_moe.checkpoints.layout import read_record
from litgpt_moe.checkpoints.reader import load_model, verify_checkpoint
from litgpt_moe.config import MoEConfig
from tools.average import main

pytestmark = pytest.mark.usefixtures("eager")


def made(folder: Path, tokenizer_dir: Path, seed: int, dtype: torch.dtype = torch.float32, **config) -> Path:
    """Write a checkpoint of random weights as LitGPT does."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    model = GPT(MoEConfig(**{**TINY_CONFIG, **config}))
    torch.save({"model": model.to(dtype).state_dict()}, folder / "lit_model.pth")
    save_config(model.config, folder)
    copy_config_files(tokenizer_dir, folder)
    return folder


def average(*argv: object) -> int:
    return main([str(word) for word in argv])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_weight_is_the_mean_added_up_in_float32(dtype, tmp_path, tiny_tokenizer_dir):
    folders = [made(tmp_path / str(seed), tiny_tokenizer_dir, seed, dtype) for seed in (1, 2, 3)]
    assert average(*folders, tmp_path / "out") == 0
    verify_checkpoint(tmp_path / "out")
    parts, found = [runs.weights(folder) for folder in folders], runs.weights(tmp_path / "out")
    assert found.keys() == parts[0].keys()
    for name, weight in found.items():
        wanted = torch.stack([part[name].double() for part in parts]).mean(dim=0)
        tolerance = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-9}
        assert weight.dtype == dtype
        torch.testing.assert_close(weight.double(), wanted, **tolerance)
    made_of = read_record(tmp_path / "out")["averaged"]
    assert [Path(each["path"]).name for each in made_of] == ["1", "2", "3"]


def test_the_last_checkpoints_of_a_run_are_averaged_and_evaluated(workspace, tiny_data, capsys):
    assert runs.run("--train.save_interval", 2) == 0
    assert average("out", "--last", 3, "out/average") == 0
    told = capsys.readouterr().out
    assert [f"step-0000000{step}" in told for step in (2, 4, 6, 8)] == [False, True, True, True]
    parts = [runs.weights(f"out/step-0000000{step}") for step in (4, 6, 8)]
    name = "transformer.h.1.mlp.experts.3.proj.weight"
    torch.testing.assert_close(runs.weights("out/average")[name], sum(p[name] for p in parts) / 3)
    assert evaluate(["--ckpt_dir", "out/average", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["data_dir"] == str(tiny_data)
    assert average("out", "--last", 9, "out/more") == 2
    assert "holds 4 checkpoints of different steps, --last is 9" in capsys.readouterr().err


def test_an_average_is_replaced_on_demand_alone_and_nothing_else_is(tmp_path, tiny_tokenizer_dir, capsys):
    a, b, c = (made(tmp_path / name, tiny_tokenizer_dir, seed) for seed, name in enumerate("abc"))
    out, other = tmp_path / "out", Path(shutil.copytree(a, tmp_path / "other"))
    assert average(a, b, out) == 0
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    first = (out / "lit_model.pth").read_bytes()
    assert average(a, c, out) == 2 and "add --overwrite" in capsys.readouterr().err
    assert (out / "lit_model.pth").read_bytes() == first
    assert average(a, c, out, "--overwrite") == 0
    verify_checkpoint(out)
    assert (out / "lit_model.pth").read_bytes() != first and (out / "notes.txt").read_text() == "mine"
    assert average(b, c, other, "--overwrite") == 2 and "nor an average" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "other", "out"]


def test_what_cannot_be_averaged_is_one_sentence_and_writes_nothing(tmp_path, tiny_tokenizer_dir, capsys):
    a = made(tmp_path / "a", tiny_tokenizer_dir, 1)
    wider = made(tmp_path / "wider", tiny_tokenizer_dir, 2, n_expert=8)
    strange = Path(shutil.copytree(a, tmp_path / "strange"))
    text = (strange / "tokenizer.json").read_text(encoding="utf-8")
    (strange / "tokenizer.json").write_text(text.replace("<unk>", "<odd>"), encoding="utf-8")
    broken = made(tmp_path / "broken", tiny_tokenizer_dir, 3)
    weights = runs.weights(broken)
    weights["lm_head.weight"][0, 0] = float("nan")
    torch.save({"model": weights}, broken / "lit_model.pth")
    biased = Path(shutil.copytree(a, tmp_path / "biased"))
    weights = runs.weights(a)
    weights |= {f"transformer.h.{i}.mlp.e_score_correction_bias": torch.ones(4) for i in (0, 1)}
    torch.save({"model": weights}, biased / "lit_model.pth")
    for places, words in {
        (a, wider): "n_expert is 8, in",
        (a, strange): "its tokenizer is not that of",
        (a, broken): "not finite",
        (a, biased): "selection bias",
        (a, a / "lit_model.pth"): "named twice",
        (a,): "name two or more",
        (a, tmp_path / "none"): "no such checkpoint directory",
    }.items():
        assert average(*places, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not (tmp_path / "out").exists()
    # all of them with a bias have a mean
    twin = Path(shutil.copytree(biased, tmp_path / "twin"))
    assert average(biased, twin, tmp_path / "out") == 0
    assert load_model(tmp_path / "out").state_dict().keys() == weights.keys()
    assert read_record(tmp_path / "out")["selection_bias"] is True


def test_tied_weights_stay_tied(tmp_path, tiny_tokenizer_dir):
    folders = [made(tmp_path / str(seed), tiny_tokenizer_dir, seed) for seed in (1, 2)]
    for folder in folders:
        weights = runs.weights(folder)
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
        torch.save({"model": weights}, folder / "lit_model.pth")
    assert average(*folders, tmp_path / "out") == 0
    found = runs.weights(tmp_path / "out")
    assert found["lm_head.weight"].data_ptr() == found["transformer.wte.weight"].data_ptr()
