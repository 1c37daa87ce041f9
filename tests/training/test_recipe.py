"""The settings of `recipe`: what each does to a step, that a run with them resumes, and what is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_CONFIG
from helpers.runs import assert_same_run, edit_yaml, losses, refusal, run, weights
from litgpt import GPT

from generate import main as generate
from litgpt_moe.checkpoints.reader import load_model
from litgpt_moe.config import MoEConfig
from litgpt_moe.generation.decode import make_decoder
from litgpt_moe.generation.decoder import TorchDecoder
from litgpt_moe.training.optimizer import make_optimizer
from litgpt_moe.training.recipe import set_rates
from litgpt_moe.training.settings import RecipeArgs, Settings

pytestmark = pytest.mark.usefixtures("eager", "workspace")
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.5}}
MUON = {"class_path": "torch.optim.Muon", "init_args": {"lr": 0.01, "weight_decay": 0.5}}
ALL = (
    *("--recipe.embedding_lr", 3, "--recipe.head_lr", 0.5, "--recipe.other_lr", 2),
    *("--recipe.decay_to_zero", "--recipe.cautious_decay", "--recipe.zero_head"),
)


def stepped(spec: dict, recipe: RecipeArgs, done: float = 0.0) -> tuple[dict, dict, dict]:
    """Take a step; return the weights before and after it, and the learning rate of each."""
    torch.manual_seed(0)
    model = GPT(MoEConfig(**TINY_CONFIG))
    optimizer = make_optimizer(Settings(recipe=recipe), model, spec)
    set_rates(optimizer, 0.01, done, recipe)
    names = {weight: name for name, weight in model.named_parameters()}
    before = {name: weight.detach().clone() for weight, name in names.items()}
    for weight in names:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    rates = {names[w]: group["lr"] for group in optimizer.param_groups for w in group["params"]}
    assert rates.keys() == before.keys()
    return before, {name: weight.detach() for weight, name in names.items()}, rates


@pytest.mark.parametrize("spec", [ADAMW, MUON], ids=["adamw", "muon"])
def test_each_kind_of_weight_has_its_own_learning_rate(spec: dict) -> None:
    *_, rates = stepped(spec, RecipeArgs(embedding_lr=3.0, head_lr=0.5, other_lr=2.0))
    wanted = dict.fromkeys(rates, 0.01)
    wanted |= {name: 0.02 for name in rates if "norm" in name or "ln_f" in name or "mlp.gate" in name}
    wanted |= {"transformer.wte.weight": 0.03, "lm_head.weight": 0.005}
    assert rates == pytest.approx(wanted)
    *_, alike = stepped(spec, RecipeArgs())
    assert set(alike.values()) == {0.01}


@pytest.mark.parametrize("spec", [ADAMW, MUON], ids=["adamw", "muon"])
def test_cautious_decay_shrinks_only_what_the_step_shrinks(spec: dict) -> None:
    none = {**spec, "init_args": {**spec["init_args"], "weight_decay": 0.0}}
    before, without, _ = stepped(none, RecipeArgs())
    _, full, _ = stepped(spec, RecipeArgs())
    _, cautious, _ = stepped(spec, RecipeArgs(cautious_decay=True))
    name = "transformer.h.0.mlp.experts.1.fc_1.weight"
    shrinks = (before[name] - without[name]) * before[name] >= 0
    assert 0.2 < shrinks.float().mean() < 0.8
    torch.testing.assert_close(cautious[name], torch.where(shrinks, full[name], without[name]))
    assert not torch.equal(full[name], without[name])
    norm = "transformer.h.0.norm_1.weight"
    assert torch.equal(cautious[norm], without[norm])  # not decayed at all


def test_the_decay_ends_at_zero() -> None:
    recipe = RecipeArgs(decay_to_zero=True)
    none = {**ADAMW, "init_args": {"lr": 0.01, "weight_decay": 0.0}}
    half = {**ADAMW, "init_args": {"lr": 0.01, "weight_decay": 0.25}}
    for done, same_as in ((0.0, ADAMW), (0.5, half), (1.0, none)):
        _, lowered, _ = stepped(ADAMW, recipe, done)
        _, wanted, _ = stepped(same_as, RecipeArgs())
        torch.testing.assert_close(lowered, wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["AdamW", "Muon"])
def test_a_run_with_the_whole_recipe_resumes_bit_for_bit(kind: str) -> None:
    flags = (*ALL, "--optimizer", f"torch.optim.{kind}")
    assert run("--out_dir", "whole", *flags) == 0
    # every word was equally probable before the first step
    assert losses("whole")[0] == pytest.approx(torch.tensor(512.0).log().item(), abs=1e-4)
    shutil.copytree("whole", "parts")
    for name in ("final", "step-00000008"):
        shutil.rmtree(Path("parts", name))
    assert run("--out_dir", "parts", "--resume", "auto", *flags) == 0
    assert_same_run("parts", "whole")


@pytest.mark.parametrize("norm_qk", [False, True])
def test_the_keys_of_a_model_that_a_recipe_may_change_train_resume_and_decode(
    norm_qk: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"norm_qk": norm_qk, "n_shared_expert": 1, "n_expert": 8}
    for key, value in {**keys, "first_k_dense_replace": 1, "intermediate_size": 24}.items():
        edit_yaml("model_config.yaml", key, value)
    assert run("--out_dir", "whole") == 0
    shutil.copytree("whole", "parts")
    for name in ("final", "step-00000008"):
        shutil.rmtree(Path("parts", name))
    assert run("--out_dir", "parts", "--resume", "auto") == 0
    assert_same_run("parts", "whole")
    model = load_model(Path("whole/final"))
    # compiled code does not know a norm of queries and keys: PyTorch decodes such a model
    assert isinstance(make_decoder(model), TorchDecoder) or not norm_qk
    capsys.readouterr()
    assert generate(["--ckpt_dir", "whole", "--prompt", "Tom", "--max_tokens", "9", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("Tom")


def test_the_rates_of_a_resumed_run_are_those_of_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--recipe.head_lr", 2) == 0
    shutil.copytree("out", "changed")
    for out_dir, rate in (("out", 2), ("changed", 0)):
        for name in ("final", "step-00000008"):
            shutil.rmtree(Path(out_dir, name))
        assert run("--out_dir", out_dir, "--resume", "auto", "--recipe.head_lr", rate) == 0
    assert "recipe.head_lr 2.0 -> 0.0" in capsys.readouterr().err
    early = weights("changed/step-00000004")["lm_head.weight"]
    assert torch.equal(weights("changed/final")["lm_head.weight"], early)
    assert not torch.equal(weights("out/final")["lm_head.weight"], early)
    for name in ("final", "step-00000008"):
        shutil.rmtree(Path("out", name))
    assert run("--resume", "auto") == 2
    assert "recipe.*_lr was set, now it is not set" in capsys.readouterr().err


def test_what_a_recipe_cannot_be_used_with_is_refused() -> None:
    sgd = ("--optimizer", "torch.optim.SGD", "--optimizer.lr", 0.1)
    assert "cautious_decay needs AdamW or Muon" in refusal("--recipe.cautious_decay", *sgd)
    assert "tied embedding" in refusal("--recipe.zero_head", "--train.tie_embeddings", "true")
    assert "recipe.other_lr is -1.0; choose 0 or more" in refusal("--recipe.other_lr", -1)
