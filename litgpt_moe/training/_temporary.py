"""Stand-ins for modules that are being written elsewhere, under the names agreed on.

For the integrator: delete this file, and point each `from litgpt_moe.training._temporary import ...` at the
module that the comment beside the name says.
"""

from dataclasses import dataclass

from moe_layers import MoEConfig, count_parameters


@dataclass(frozen=True)
class ModelFacts:  # litgpt_moe.config
    """What is known of a model from its configuration alone."""

    total_params: int
    active_params: int
    flops_per_token: float


def model_facts(config: MoEConfig, block_size: int | None = None) -> ModelFacts:  # litgpt_moe.config
    """Return the facts of a model; builds it once on the meta device."""
    total, active = count_parameters(config)
    embedding = config.padded_vocab_size * config.n_embd
    attention = 12 * config.n_layer * config.n_head * (config.head_size or 0) * (block_size or config.block_size)
    return ModelFacts(total, active, 6 * (active - embedding) + attention)
