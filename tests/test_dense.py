"""Dense models go the way of the others: trained, scored, generated with, reported, read by stock LitGPT."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import DENSE_CONFIG
from helpers.runs import losses, run

import evaluate
import generate
from litgpt_moe.checkpoints.reader import load_model
from litgpt_moe.report.page import make_page
from litgpt_moe.report.read import read_run


@pytest.fixture
def trained(workspace: Path, eager: None) -> Path:
    """A dense model after eight steps, with the balance losses of the others in its settings."""
    Path("model_config.yaml").write_text(yaml.dump(DENSE_CONFIG), encoding="utf-8")
    assert run("--moe.aux_loss_coef", 0.01, "--moe.z_loss_coef", 0.001, "--eval.max_new_tokens", 8) == 0
    return workspace / "out"


def test_a_dense_model_goes_the_way_of_the_others(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert losses()[-1] < losses()[0]
    assert evaluate.main(["--ckpt_dir", str(trained), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["expert_load"] == {} and 0 < scores["loss"] < 7
    assert evaluate.main(["--ckpt_dir", str(trained)]) == 0
    assert "expert load" not in capsys.readouterr().out
    texts = []
    for engine in ("native", "torch"):
        flags = ["--prompt", "Tom had", "--max_tokens", "8", "--temperature", "0", "--engine", engine]
        assert generate.main(["--ckpt_dir", str(trained), *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    log = read_run(trained, "dense", Path("results.jsonl"))
    assert log.heat is None and '"heat": null' in make_page([log])
    # a run goes on from its checkpoint
    assert run("--resume", "auto", "--train.max_tokens", 12 * 4 * 64) == 0
    assert len(losses()) == 12


def test_stock_litgpt_computes_the_same(trained: Path) -> None:
    from litgpt import GPT, Config

    folder = trained / "final"
    stock = GPT(Config.from_file(folder / "model_config.yaml"))
    stock.load_state_dict(torch.load(folder / "lit_model.pth", weights_only=True)["model"])
    ids = torch.arange(40)[None] % 500
    with torch.no_grad():
        assert torch.equal(stock(ids), load_model(folder)(ids))
