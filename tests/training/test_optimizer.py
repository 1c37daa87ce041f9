"""Which optimizer moves which weights, and with which decay; the figures that a row tells of the step."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TINY_CONFIG
from helpers import compiling_sgd
from helpers.runs import assert_same_run, edit_yaml, losses, rows, run, weights
from litgpt import GPT

import litgpt_moe
from litgpt_moe.config import MoEConfig, model_facts
from litgpt_moe.training import optimizer
from litgpt_moe.training.optimizer import make_optimizer, sort_parameters, try_step
from litgpt_moe.training.settings import Settings

pytestmark = pytest.mark.usefixtures("eager", "workspace")


def test_no_decay_reaches_norms_biases_embeddings_and_routers() -> None:
    model = GPT(MoEConfig(**{**TINY_CONFIG, "bias": True, "norm_qk": True}))
    matrices, head, rest = (
        {name for name, weight in model.named_parameters() if any(weight is part for part in parts)}
        for parts in sort_parameters(model)
    )
    assert matrices | head | rest == dict(model.named_parameters()).keys()
    assert head == {"lm_head.weight"}
    assert {name for name in rest if dict(model.named_parameters())[name].ndim == 2} == {
        "transformer.wte.weight",
        "transformer.h.0.mlp.gate.weight",
        "transformer.h.1.mlp.gate.weight",
    }
    assert all(dict(model.named_parameters())[name].ndim == 2 for name in matrices)


def test_tied_embeddings_count_as_embeddings() -> None:
    model = GPT(MoEConfig(**TINY_CONFIG))
    model.transformer.wte.weight = model.lm_head.weight
    _, head, rest = sort_parameters(model)
    assert not head and any(weight is model.lm_head.weight for weight in rest)


def test_what_an_optimizer_compiles_runs_eagerly_where_the_model_does() -> None:
    torch.compiler.set_stance("default")
    edit_yaml("train_config.yaml", "optimizer", {"class_path": "helpers.compiling_sgd.CompilingSGD"})
    edit_yaml("train_config.yaml", "optimizer.init_args", {"lr": 0.01})
    assert run("--max_tokens", 512) == 0
    assert compiling_sgd.GRAPHS == []


@pytest.mark.parametrize(("where", "n_decayed"), [("matrices", 1), ("all", 2)])
def test_decay_shrinks_the_weights_it_is_meant_for(where: str, n_decayed: int) -> None:
    # a learning rate of 1e-30 leaves decay alone to move them: w *= 1 - lr * decay
    flags = (
        "--max_tokens",
        256,
        "--train.lr_warmup_steps",
        0,
        "--train.min_lr",
        0,
        "--schedule.name",
        "constant",
    )
    huge = ("--optimizer.lr", 1e-30, "--optimizer.weight_decay", 5e29)
    assert run("--out_dir", "still", *flags, "--optimizer.lr", 1e-30, "--optimizer.weight_decay", 0) == 0
    assert run("--out_dir", "decayed", *flags, *huge, "--weight_decay_on", where) == 0
    before, after = weights("still/final"), weights("decayed/final")
    matrix, embedding = "transformer.h.0.attn.qkv.weight", "transformer.wte.weight"
    shrunk = [name for name in (matrix, embedding) if torch.allclose(after[name], before[name] / 2)]
    assert shrunk == [matrix, embedding][:n_decayed]


def test_muon_moves_the_hidden_matrices_and_resumes_exactly() -> None:
    edit_yaml("train_config.yaml", "optimizer", {"class_path": "torch.optim.Muon", "init_args": {"lr": 0.01}})
    assert run("--out_dir", "whole") == 0
    assert losses("whole")[-1] < losses("whole")[0] - 0.5
    state = torch.load("whole/final/lit_model.pth", weights_only=True)["optimizer"]["state"]
    kinds = [set(entry) for entry in state.values()]
    assert {"momentum_buffer"} in kinds and {"step", "exp_avg", "exp_avg_sq"} in kinds
    assert_goes_on_exactly()


class StepsOnCudaAlone(torch.optim.SGD):
    """As bitsandbytes' optimizers are."""

    def step(self, closure: Any = None) -> Any:
        raise NotImplementedError("no kernel for the CPU")


def test_the_first_step_of_somebody_s_optimizer_is_tried_on_its_own_device_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(NotImplementedError):
        try_step(Settings(), StepsOnCudaAlone, {})
    monkeypatch.setattr(optimizer, "has_cuda", lambda: True)
    try_step(Settings(), StepsOnCudaAlone, {})
    try_step(Settings(), torch.optim.NAdam, {"capturable": True})
    with pytest.raises(ValueError, match="Number of steps"):
        try_step(Settings(), torch.optim.Muon, {"ns_steps": 200})
    with pytest.raises(NotImplementedError):
        try_step(Settings(accelerator="cpu"), StepsOnCudaAlone, {})


def test_adafactor_resumes_exactly() -> None:
    edit_yaml("train_config.yaml", "optimizer", {"class_path": "Adafactor", "init_args": {"lr": 0.01}})
    assert run("--out_dir", "whole") == 0
    state = torch.load("whole/final/lit_model.pth", weights_only=True)["optimizer"]["state"]
    assert {frozenset(entry) for entry in state.values()} == {
        frozenset({"step", "row_var", "col_var"}),
        frozenset({"step", "variance"}),
    }
    assert_goes_on_exactly()


def assert_goes_on_exactly() -> None:
    shutil.copytree("whole", "parts")
    for name in ("final", "step-00000008"):
        shutil.rmtree(Path("parts", name))
    assert run("--out_dir", "parts", "--resume", "auto") == 0
    assert_same_run("parts", "whole")


def test_muon_orthogonalises_each_expert_by_itself() -> None:
    model = GPT(MoEConfig(**TINY_CONFIG))
    spec = {"class_path": "torch.optim.Muon", "init_args": {"lr": 0.1, "weight_decay": 0.0}}
    muon = make_optimizer(Settings(), model, spec)
    expert = model.transformer.h[0].mlp.experts[1].fc_1.weight
    before = expert.detach().clone()
    expert.grad = torch.randn_like(expert)
    alone = torch.nn.Parameter(before.clone())
    alone.grad = expert.grad.clone()
    torch.optim.Muon([alone], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    muon.step()
    assert torch.equal(expert, alone) and not torch.equal(expert, before)


def test_a_row_tells_the_work_so_far() -> None:
    assert run() == 0
    per_token = model_facts(MoEConfig(**TINY_CONFIG), block_size=64).flops_per_token
    logged = [row for row in rows() if row["loss"]]
    assert [float(row["flops"]) for row in logged] == [step * 256 * per_token for step in range(1, 9)]
    # what a CPU could do at most is not known
    assert {row["mfu"] for row in logged} == {""}


def test_the_load_the_stories_and_the_command_are_on_file_and_sampling_changes_nothing() -> None:
    assert run("--out_dir", "silent") == 0
    assert run("--out_dir", "telling", "--eval.max_new_tokens", 5) == 0
    one, other = weights("silent/final"), weights("telling/final")
    assert all(torch.equal(one[name], other[name]) for name in one)
    stories = list(csv_rows("telling/logs/stories.csv"))
    assert [row["step"] for row in stories] == ["4", "8"]
    assert all(row["text"].startswith(row["prompt"][:4]) for row in stories)
    loads = list(csv_rows("telling/logs/expert_load.csv"))
    assert len(loads) == 8 * 2
    assert all(sum(int(row[f"e{e}"]) for e in range(4)) == 4 * 64 * 2 for row in loads)
    facts = json.loads(Path("telling/logs/run.json").read_text(encoding="utf-8"))
    assert facts["settings"]["train"]["global_batch_size"] == 4 and facts["versions"]["litgpt"] == "0.5.13"
    assert facts["versions"]["litgpt_moe"] == litgpt_moe.__version__
    assert (
        yaml.safe_load(Path("telling/final/train_config.yaml").read_text(encoding="utf-8"))
        == facts["settings"]
    )


def csv_rows(path: str) -> list[dict[str, str]]:
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_resumed_run_takes_its_own_weight_decay_and_not_the_saved_one() -> None:
    assert run("--max_tokens", 1024) == 0
    assert run("--max_tokens", 1280, "--resume", "auto", "--optimizer.weight_decay", 0.5) == 0
    state = torch.load("out/final/lit_model.pth", weights_only=True)
    assert [group["weight_decay"] for group in state["optimizer"]["param_groups"]] == [0.5, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_keeps_its_momentum_in_every_dtype(dtype: torch.dtype) -> None:
    model = GPT(MoEConfig(**TINY_CONFIG)).to(dtype)
    spec = {"class_path": "torch.optim.Muon", "init_args": {"momentum": 0.5, "nesterov": False}}
    optimizer = make_optimizer(Settings(), model, spec)
    for _ in range(2):
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    momentum = optimizer.state[optimizer.param_groups[0]["params"][0]]["momentum_buffer"]
    # zeros, half way to the gradient of ones, and again
    assert momentum.eq(0.75).all()
