"""Models of equal FLOPs: the dense twin of a Mixture of Experts, and siblings with other numbers of experts.

FLOPs are those that training counts, `litgpt_moe.config.model_facts`: attention and head included. Active
parameters are no measure: they count the token embedding, which is looked up, and leave out attention.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from litgpt.config import Config

from litgpt_moe.config import AUTO, MoEConfig, has_open_vocabulary, header_vocabulary, model_facts
from litgpt_moe.shell import command_line
from litgpt_moe.words import ROOT

# of an MLP's width: matrix kernels are fastest there, and grouped_mm needs it in bf16
MULTIPLE = 8
# what a model without experts has in these keys: LitGPT's defaults
NO_EXPERTS = {
    "n_expert": 0,
    "n_expert_per_token": 0,
    "moe_intermediate_size": None,
    "n_shared_expert": None,
    "n_expert_groups": None,
    "n_topk_groups": None,
    "n_topk_scores_per_group": None,
    "first_k_dense_replace": None,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
}


@dataclass(frozen=True)
class Matched:
    """A configuration whose MLPs were given the width that comes nearest to another's FLOPs."""

    config: MoEConfig
    flops_per_token: int
    wanted: int
    """FLOPs a token of the configuration that it is to equal."""

    @property
    def left_over(self) -> float:
        """FLOPs a token that the match has more (or, below 0, less), as a share of those wanted."""
        return self.flops_per_token / self.wanted - 1

    @property
    def how(self) -> str:
        """The width that was found, and what is left over."""
        width = self.config.moe_intermediate_size if self.config.n_expert else self.config.intermediate_size
        return f"MLPs {width} wide for {self.wanted:,} FLOPs a token, {self.left_over:+.2%}"

    def __str__(self) -> str:
        """Return the line that a tool prints."""
        return f"{self.config.name}: {self.how}"


def dense_twin(config: MoEConfig) -> Matched:
    """Return the dense model of the same depth, width and heads, and of the same FLOPs a token."""
    if not config.n_expert:
        raise ValueError(f"{config.name} has no experts; a dense twin is made of a model with n_expert")
    values = {**NO_EXPERTS, "mlp_class_name": "LLaMAMLP", "intermediate_size": MULTIPLE}
    return with_flops(dataclasses.replace(config, **values), "Dense", model_facts(config).flops_per_token)


def with_experts(config: MoEConfig, n_expert: int) -> Matched:
    """Return the model with another number of experts, as many of them chosen, and the same FLOPs a token.

    A larger router takes some of the FLOPs, so the experts may be a little narrower.
    """
    if not config.n_expert:
        raise ValueError(f"{config.name} has no experts; name a configuration that has some")
    if config.n_expert_groups:
        raise ValueError(
            f"{config.name} has n_expert_groups; write the configuration of each number yourself"
        )
    other = dataclasses.replace(config, n_expert=n_expert)
    return with_flops(other, f"MoE-{n_expert}x", model_facts(config).flops_per_token)


def with_flops(config: MoEConfig, kind: str, wanted: int) -> Matched:
    """Return `config` with the width of its MLPs that comes nearest to `wanted` FLOPs a token.

    Its name becomes `kind` and its total parameters. ValueError if even the narrowest MLP takes too many.
    """
    key = "moe_intermediate_size" if config.n_expert else "intermediate_size"

    def of_width(width: int) -> MoEConfig:
        return dataclasses.replace(config, **{key: width})

    # the FLOPs are linear in the width
    least = model_facts(of_width(MULTIPLE)).flops_per_token
    each = model_facts(of_width(2 * MULTIPLE)).flops_per_token - least
    n = 1 + round((wanted - least) / each)
    if n < 1:
        text = f"{config.name}: all but its MLPs takes {least - each:,} FLOPs a token, of {wanted:,} wanted"
        raise ValueError(f"{text}; choose a larger moe_intermediate_size or fewer experts")
    matched = of_width(n * MULTIPLE)
    facts = model_facts(matched)
    name = f"{kind}-{facts.total_params / 1e6:.3g}M"
    return Matched(dataclasses.replace(matched, name=name), facts.flops_per_token, wanted)


def changed_keys(config: Config) -> dict[str, Any]:
    """Return the keys of a configuration that are not LitGPT's defaults: what describes the model."""
    usual = Config(n_head=config.n_head, n_embd=config.n_embd, block_size=config.block_size)
    sizes = ("n_head", "n_embd", "block_size", "n_layer", "vocab_size", "padded_vocab_size")
    # padding_multiple only helps to find padded_vocab_size, which is given
    keys = [item.name for item in dataclasses.fields(Config)]
    keys = [key for key in keys if key not in ("hf_config", "padding_multiple")]
    values = {key: getattr(config, key) for key in keys}
    return {key: v for key, v in values.items() if key in sizes or v != getattr(usual, key)}


def yaml_text(matched: Matched, source: Path) -> str:
    """Return the YAML file of a match, with a head that says what it is and which command made it.

    Where the source leaves the vocabulary open, the FLOPs are equal at the one that its header names, and
    nearly so at others.
    """
    inside = source.resolve().relative_to(ROOT) if source.resolve().is_relative_to(ROOT) else source
    made = command_line("uv", "run", "python", "tools/dense_twin.py", inside.as_posix())
    facts, values, at = model_facts(matched.config), changed_keys(matched.config), ""
    if has_open_vocabulary(source):
        values["vocab_size"] = AUTO
        del values["padded_vocab_size"]
        at = f", at a vocabulary of {header_vocabulary(source):,}"
    head = (
        f"# {matched.config.name}, the dense twin of {source.name}: {facts.total_params / 1e6:.1f}M "
        f"parameters, {facts.active_params / 1e6:.1f}M of them active for a token{at}.\n"
        f"# Made by: {made}\n"
        f"# FLOPs:   {matched.flops_per_token:,} a token, {matched.left_over:+.2%} of the other's.\n"
    )
    return head + yaml.safe_dump(values, sort_keys=False)
