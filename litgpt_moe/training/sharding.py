"""FSDP: weights sharded over GPUs, with checkpoints as one process writes them."""

import contextlib
from typing import Any

from lightning.fabric import Fabric
from lightning.fabric.strategies.fsdp import FSDPStrategy
from lightning.fabric.utilities.load import _move_state_into
from litgpt.model import Block
from litgpt.utils import reset_parameters
from torch import nn
from torch.distributed import fsdp
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from litgpt_moe.checkpoints.writer import CheckpointWriter
from litgpt_moe.training.optimizer import plain_name
from litgpt_moe.training.resume import OpenCheckpoint


def is_sharded(fabric: Fabric) -> bool:
    """Return whether each process holds only a part of the weights (FSDP)."""
    return isinstance(fabric.strategy, FSDPStrategy)


class ShardedStrategy(FSDPStrategy):
    """FSDP as litgpt.pretrain.setup configures it, with the initial weights and checkpoints of one process.

    Fabric's own save blocks training until the file is written, and it orders the optimizer's state by the
    model's parameters instead of by the optimizer's groups.
    """

    def __init__(self, writer: CheckpointWriter, opened: OpenCheckpoint | None) -> None:
        super().__init__(auto_wrap_policy={Block}, state_dict_type="full", sharding_strategy="HYBRID_SHARD")
        self._writer, self._opened = writer, opened

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Initialise the whole model, then shard it: Fabric initialises shards, and unties tied weights."""
        embedding, head = module.get_submodule("transformer.wte"), module.get_submodule("lm_head")
        is_tied = embedding.weight is head.weight
        module.to_empty(device=self.root_device)
        reset_parameters(module)
        if is_tied:
            embedding.weight = head.weight
        return super().setup_module(module)

    def save_checkpoint(self, path: Any, state: dict[str, Any], *_: Any, **__: Any) -> None:
        """Gather the whole state on rank 0 and pass it to the writer, which saves it in the background."""
        with whole_tensors(state["model"], rank0_only=True):
            optimizer_state = gather_optimizer_state(state.pop("optimizer"), state["model"])
            whole = self._convert_stateful_objects_in_state(state, filter={})
        if self.is_global_zero:
            self._writer.hold({**whole, "optimizer": optimizer_state})

    def load_checkpoint(self, path: Any, state: Any = None, strict: bool = True, **_: Any) -> dict[str, Any]:
        """Load the open checkpoint, sharded, into `state`; return the entries that `state` lacks."""
        assert self._opened is not None
        saved = self._opened.state
        if not isinstance(state, dict):  # Fabric.load_raw: a file of bare weights
            saved, state = {"model": saved}, {"model": state}
        with whole_tensors(state["model"], rank0_only=False):
            state["model"].load_state_dict(saved.pop("model"), strict=strict)
            if "optimizer" in state:
                scatter_optimizer_state(state["optimizer"], state["model"], saved.pop("optimizer"))
        _move_state_into(saved, state, keys=set(state))
        return saved


def whole_tensors(module: Any, rank0_only: bool) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which FSDP's state dicts hold whole tensors, gathered in host memory."""
    return FSDP.state_dict_type(
        module,
        fsdp.StateDictType.FULL_STATE_DICT,
        fsdp.FullStateDictConfig(offload_to_cpu=True, rank0_only=rank0_only),
        fsdp.FullOptimStateDictConfig(offload_to_cpu=True, rank0_only=rank0_only),
    )


def gather_optimizer_state(optimizer: Any, module: Any) -> dict[str, Any]:
    """Return, on rank 0, the state dict that the optimizer would have in a single process."""
    moments = FSDP.optim_state_dict(module, optimizer).get("state", {})
    names = _parameter_names(optimizer, module)
    return {
        "state": {n: moments[name] for n, name in enumerate(names) if name in moments},
        "param_groups": optimizer.state_dict()["param_groups"],
    }


def scatter_optimizer_state(optimizer: Any, module: Any, saved: dict[str, Any]) -> None:
    """Load each process's shard of an optimizer state that `gather_optimizer_state` or one process saved."""
    names = _parameter_names(optimizer, module)
    groups = [{**group, "params": [names[n] for n in group["params"]]} for group in saved["param_groups"]]
    named = {"state": {names[n]: moments for n, moments in saved["state"].items()}, "param_groups": groups}
    optimizer.load_state_dict(FSDP.optim_state_dict_to_load(module, optimizer, named))


def _parameter_names(optimizer: Any, module: Any) -> list[str]:
    """Return the names of the optimizer's parameters, in the order in which its state dict numbers them."""
    names = {id(weight): plain_name(name) for name, weight in module.named_parameters()}
    return [names[id(weight)] for group in optimizer.param_groups for weight in group["params"]]
