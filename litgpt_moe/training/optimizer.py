"""The optimizer: which weights decay, and Muon with AdamW beside it."""

import inspect
from typing import Any

import torch
from litgpt import GPT
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from litgpt_moe.hardware import has_cuda
from litgpt_moe.training.class_path import find_class
from litgpt_moe.training.recipe import LR_FACTOR, apply_recipe, has_own_rates
from litgpt_moe.training.settings import Settings

# optimizers that the loop cannot drive, and why
UNFIT_OPTIMIZERS = {
    torch.optim.SparseAdam: "for sparse gradients",
    torch.optim.LBFGS: "which computes the loss several times in a step",
}


def plain_name(name: str) -> str:
    """Return a parameter's name in the model itself, without the names of FSDP's wrappers."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")


def sort_parameters(model: GPT) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Return the hidden matrices, the output head, and the others: embedding, routers, norms and biases."""
    named = dict(model.named_parameters())
    n_dims = {name: weight.ndim for name, weight in named.items()}
    if any(name != plain_name(name) for name in named):
        # FSDP flattens the parameters; their shapes are those of the model before
        with torch.device("meta"):
            n_dims = {name: weight.ndim for name, weight in GPT(model.config).named_parameters()}
    # with tied embeddings this is the head too
    embedding = model.get_submodule("transformer.wte").weight
    matrices, head, others = [], [], []
    for name, weight in named.items():
        name = plain_name(name)
        if weight is embedding or n_dims.get(name, 1) < 2 or name.endswith("mlp.gate.weight"):
            others.append(weight)
        else:
            (head if name.startswith("lm_head") else matrices).append(weight)
    return matrices, head, others


class MuonWithAdamW(Optimizer):
    """Muon (kellerjordan.github.io/posts/muon) for the hidden matrices, AdamW for all other weights.

    Muon updates each matrix, so each expert, by itself. One learning rate serves both: Muon's updates are
    scaled to the RMS of AdamW's (arxiv.org/abs/2502.16982, section 2.2), unless init_args name another
    adjust_lr_fn.
    """

    def __init__(self, matrices: list[nn.Parameter], others: list[dict[str, Any]], **init_args: Any) -> None:
        init_args.setdefault("adjust_lr_fn", "match_rms_adamw")
        shared = {key: init_args[key] for key in ("lr", "weight_decay") if key in init_args}
        # 0.95 for the second moment is usual for AdamW beside Muon
        adamw = AdamW(others, **shared, betas=(0.9, 0.95), fused=True)
        self.parts: list[Optimizer] = [Muon(matrices, **init_args), adamw]
        groups = [group for part in self.parts for group in part.param_groups]
        super().__init__(groups, self.parts[0].defaults)
        self._share()

    def _share(self) -> None:
        """Let both parts use this optimizer's groups and state, which checkpoints save and load."""
        n_muon = len(self.parts[0].param_groups)
        parts_groups = (self.param_groups[:n_muon], self.param_groups[n_muon:])
        for part, groups in zip(self.parts, parts_groups, strict=True):
            part.param_groups, part.state = groups, self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the groups and state; torch replaces the objects, so share the new ones."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Any = None) -> Any:
        """Take a step with both parts."""
        momentum = self._next_momentum()
        for part in self.parts:
            part.step()
        for weight, value in momentum.items():
            self.state[weight]["momentum_buffer"].copy_(value)

    def _next_momentum(self) -> dict[nn.Parameter, torch.Tensor]:
        """Return the momentum that the step will have, of the weights where torch 2.10 and 2.11 lose it.

        Without Nesterov's momentum, torch's Muon normalises the momentum itself where it is in bfloat16: what
        should be a copy in bfloat16 is no copy (torch/optim/_muon.py; torch 2.15 copies).
        """
        found = {}
        for group in self.parts[0].param_groups:
            weights = [] if group["nesterov"] else [w for w in group["params"] if w.grad is not None]
            for weight in weights:
                if weight.grad.dtype is torch.bfloat16:
                    momentum = self.state[weight].get("momentum_buffer", torch.zeros_like(weight.grad))
                    found[weight] = momentum.lerp(weight.grad, 1 - group["momentum"])
        return found


def make_optimizer(settings: Settings, model: GPT, spec: dict[str, Any]) -> Optimizer:
    """Return the optimizer that `spec` describes, its weights grouped by `weight_decay_on`."""
    kind, embedding = find_class("optimizer", spec), model.get_submodule("transformer.wte").weight
    optimizer = _make(settings, kind, spec["init_args"], *sort_parameters(model), embedding)
    return apply_recipe(settings.recipe, optimizer)


def try_step(settings: Settings, kind: type, init_args: dict[str, Any]) -> None:
    """Build an optimizer as `make_optimizer` does, for tiny weights, and take a step.

    torch refuses some values when an optimizer is built and others at the first step. What it raises passes
    through; ValueError for a weight decay under which no weight stays finite.
    """
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (2, 2), (2,))]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    is_elsewhere = has_cuda() and settings.accelerator != "cpu"
    if is_elsewhere:
        # for CUDA alone, and this is tried on the CPU
        init_args = {name: value for name, value in init_args.items() if name != "capturable"}
    optimizer = _make(settings, kind, init_args, *([weight] for weight in weights))
    # those of bitsandbytes take steps on CUDA alone
    if kind.__module__.startswith("torch.optim") or not is_elsewhere:
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
    for group in optimizer.param_groups:
        lr, decay = group.get("lr"), group.get("weight_decay")
        if isinstance(lr, int | float) and isinstance(decay, int | float) and lr * decay > 1:
            text = f"weight_decay {decay:g} times lr {lr:g} is above 1"
            raise ValueError(f"{text}, so that weights change their sign in a step; lower it (0.1 is usual)")


def _make(
    settings: Settings,
    kind: type,
    init_args: dict[str, Any],
    matrices: list[nn.Parameter],
    head: list[nn.Parameter],
    others: list[nn.Parameter],
    embedding: Any = None,
) -> Optimizer:
    init_args, parameters = dict(init_args), inspect.signature(kind).parameters
    without_decay: dict[str, Any] = {"params": others}
    if settings.weight_decay_on == "matrices" and "weight_decay" in parameters:
        without_decay["weight_decay"] = 0.0
    recipe = settings.recipe
    groups: list[dict[str, Any]] = [{"params": head}, without_decay]
    if own_rates := has_own_rates(recipe):
        rest = {**without_decay, "params": [weight for weight in others if weight is not embedding]}
        words = {**without_decay, "params": [weight for weight in others if weight is embedding]}
        rates = (recipe.head_lr, recipe.embedding_lr, recipe.other_lr)
        kinds = (groups[0], words, rest)
        groups = [{**group, LR_FACTOR: rate} for group, rate in zip(kinds, rates, strict=True)]
    if kind is Muon:
        return MuonWithAdamW(matrices, groups, **init_args)
    # one kernel for all weights: on two CPU cores it takes a seventh of the time of one call per weight
    if "fused" in parameters and not {"fused", "foreach"} & set(init_args):
        init_args["fused"] = True
    if own_rates:
        return kind([{"params": matrices}, *groups], **init_args)
    return kind([{"params": matrices + head}, without_decay], **init_args)


def clone_state(optimizer: Optimizer) -> None:
    """Clone the optimizer's state: after a memory-mapped load it keeps the checkpoint file in use."""
    for moments in optimizer.state.values():
        for name, value in moments.items():
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                moments[name] = value.clone()
