"""The training state in a checkpoint: counters and random generators, and the checks of a loaded state."""

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from litgpt_moe.balance import BIAS_NAME
from litgpt_moe.checkpoints.batch_sizes import BatchSizes
from litgpt_moe.checkpoints.layout import RECORD_FILE, read_record, step_of
from litgpt_moe.files import fits

MT19937_WORDS = 624  # of NumPy's generator
# per-weight state of torch's optimizers that have a fused step: Adam, AdamW, SGD (and Muon), Adagrad
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum")
# forms for `files.fits`: LitGPT's part of a training state, ours, and the random generators
LOOP_FORM = {"step_count": 0, "iter_num": 0, "model": {}, "optimizer": {}, "train_dataloader": {}}
RUN_FORM = {
    "time_s": 0.0,
    "guard": {"n_skipped": 0, "n_in_a_row": 0, "losses": [-(2.0**63)]},
    "told_step": -1,
    **dict.fromkeys(("n_rows", "n_spikes", "n_loads", "n_stories"), 0),
    "router": [{"load": torch.Tensor, "sums": torch.Tensor}],
}
# only in checkpoints of precision 16-mixed
SCALE_FORM = {"scale": 1.0, "growth_tracker": 0, "n_overflows": 0}
RNG_FORM = {"python": tuple, "numpy": tuple, "torch": torch.Tensor, "cuda": list}


@dataclass
class RunState:
    """What a run needs to resume. In a checkpoint: `run` (all but `rng`) and `rng`, beside LitGPT's keys."""

    time_s: float = 0.0
    """Seconds of training, summed over all resumes."""
    guard: dict[str, Any] = field(default_factory=lambda: {"n_skipped": 0, "n_in_a_row": 0, "losses": []})
    """State dict of the guard: skipped steps, those in a row, recent losses."""
    told_step: int = -1
    """Step of the latest story in logs/stories.csv, -1 before the first."""
    n_rows: int = 0
    n_spikes: int = 0
    n_loads: int = 0
    n_stories: int = 0
    """Rows of logs/csv/metrics.csv, and of spikes.csv, expert_load.csv and stories.csv in logs/."""
    router: list[dict[str, torch.Tensor]] = field(default_factory=list)
    """For each MoE layer since the last log row, over all ranks: `load` (E,) int64, `sums` (4,)."""
    batch_sizes: list[list[int]] = field(default_factory=list)
    """List of `BatchSizes`; empty in a checkpoint of an earlier version."""
    n_threads: int = 0
    """Threads of a run on one CPU; 0 for other devices and in a checkpoint of an earlier version."""
    loss_scale: dict[str, Any] = field(default_factory=dict)
    """State of the loss scaling; empty in other precisions than 16-mixed."""
    budget: dict[str, float] = field(default_factory=dict)
    """Time: `used_s` of all commands from their starts, `share` of train.max_time; {} in earlier versions."""
    rng: dict[str, Any] = field(default_factory=dict)
    """State of the random generators, from `rng_state`."""

    def state_dict(self) -> dict[str, Any]:
        """Return the entries `run` and `rng` of a checkpoint."""
        run = {name: value for name, value in vars(self).items() if name != "rng"}
        if not self.loss_scale:
            del run["loss_scale"]
        return {"run": run, "rng": self.rng}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the entries `run` and `rng` of a checkpoint; ValueError names one of a wrong type."""
        run = state.get("run")
        for name, form in RUN_FORM.items():
            value = run.get(name) if isinstance(run, dict) else None
            _check(f"run.{name}", value, form)
            setattr(self, name, value)
        BatchSizes.from_state(state, 1)
        self.batch_sizes = (run or {}).get("batch_sizes") or []
        if budget := (run or {}).get("budget"):
            self.budget = _check("run.budget", budget, {"used_s": 0.0, "share": 0.0})
        self.n_threads = _check("run.n_threads", (run or {}).get("n_threads", 0), 0)
        if loss_scale := (run or {}).get("loss_scale"):
            self.loss_scale = _check("run.loss_scale", loss_scale, SCALE_FORM)
        self.rng = _check("rng", state.get("rng"), RNG_FORM)
        # a trial: the run's own generators are set when it begins
        set_rng_state(self.rng, random.Random().setstate, np.random.RandomState().set_state, _try_torch)


def _check(name: str, value: Any, form: Any) -> Any:
    if not fits(value, form):
        text = " ".join(repr(value).split())
        raise ValueError(f"{name} is {text if len(text) < 60 else text[:57] + '...'}")
    return value


def check_state(state: dict[str, Any], folder: Path) -> None:
    """Raise ValueError if training cannot go on from `state`, the content of a checkpoint file in `folder`.

    Shapes are checked later, by torch and `check_moments`: load the state inside `damage_in`.
    """
    if "step_count" not in state:
        raise ValueError(f"{folder} holds weights alone; start from it with --initial_checkpoint_dir")
    with damage_in(folder):
        for name, form in LOOP_FORM.items():
            _check(name, state.get(name), form)
        _check_optimizer(state["optimizer"], [name for name in state["model"] if BIAS_NAME not in name])
        position = state["train_dataloader"]
        # ours; other data modules have keys of their own
        if "n_sequences" in position:
            _check("train_dataloader", position, {"epoch": 0, "n_used": 0, "n_sequences": 1})
            if position["n_used"] >= position["n_sequences"]:
                raise ValueError(f"train_dataloader is {position!r:.60}, which is no position in the data")
        for step in (step_of(folder), read_record(folder).get("step")):
            if step is not None and step != state["step_count"]:
                raise ValueError(
                    f"step_count is {state['step_count']}, and the checkpoint that of step {step}"
                )
        # a checkpoint of LitGPT's own loop has neither
        if "run" in state or "rng" in state or (folder / RECORD_FILE).exists():
            RunState().load_state_dict(state)


def _check_optimizer(state: dict[str, Any], weights: list[str]) -> None:
    """Raise ValueError unless the groups of a saved optimizer hold its weights."""
    if "param_groups" not in state:
        raise ValueError("optimizer has no param_groups")
    groups = _check("optimizer.param_groups", state["param_groups"], [{"params": list}])
    held = {weight for group in groups for weight in group["params"]}
    # tied, the embedding and the head are one weight
    if not len(weights) - 1 <= len(held) <= len(weights):
        raise ValueError(f"optimizer.param_groups hold {len(held)} weights, the model has {len(weights)}")
    if not _check("optimizer.state", state.get("state"), {}).keys() <= held:
        raise ValueError("optimizer.state is of a weight that no group has")


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless the loaded moments of an optimizer have the shapes of its weights.

    torch's `load_state_dict` does not check, and the fused AdamW of torch 2.10 writes out of bounds.
    """
    for group in optimizer.param_groups:
        has_state = [weight for weight in group["params"] if weight in optimizer.state]
        # Adafactor keeps sums over rows and columns of a matrix, and all of a vector
        for weights in ([w for w in has_state if w.ndim > 1], [w for w in has_state if w.ndim <= 1]):
            kept = [set(optimizer.state[weight]) for weight in weights]
            if kept and (missing := set.union(*kept) - set.intersection(*kept)):
                raise ValueError(f"optimizer.state has {min(missing)} for some weights of a group only")
    for weight, moments in optimizer.state.items():
        for name, value in moments.items():
            shape = weight.shape if name in MOMENTS else torch.Size()
            # SGD without momentum keeps None, and some optimizers count steps by a plain number
            is_plain = value is None if name in MOMENTS else isinstance(value, int | float)
            if name not in (*MOMENTS, "step") or is_plain:
                continue
            if not isinstance(value, torch.Tensor):
                kind = type(value).__name__
                raise ValueError(f"optimizer.state has a {name} that is a {kind}, not a tensor")
            if value.shape != shape:
                shapes = f"{tuple(value.shape)}, its weight is of {tuple(weight.shape)}"
                raise ValueError(f"optimizer.state has a {name} of {shapes}")


@contextlib.contextmanager
def damage_in(folder: Path) -> Iterator[None]:
    """Turn the errors of torch and others about a damaged training state into one ValueError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(
            f"{folder}: its training state is damaged: {line}; resume from another step-*, "
            f"or start from its weights with --initial_checkpoint_dir {folder}"
        ) from error


def tensors_of(state: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (dotted name, tensor) of nested dicts, lists and tuples, each of which is entered once."""
    todo, seen = [("", state)], set()
    # a foreign file may nest a million lists: no recursion, and no name grows without end
    while todo:
        name, node = todo.pop()
        if isinstance(node, torch.Tensor):
            yield name.removeprefix("."), node
        elif isinstance(node, dict | list | tuple) and id(node) not in seen:
            seen.add(id(node))
            items = list(dict.items(node) if isinstance(node, dict) else enumerate(node))
            todo += [(f"{name}.{key!s:.100}"[-300:], item) for key, item in reversed(items)]


def tensor_bytes(state: Any) -> int:
    """Return the bytes of all tensors in a nested state."""
    return sum(tensor.nbytes for _, tensor in tensors_of(state))


def non_finite(state: dict[str, Any]) -> str | None:
    """Return the name of the first weight or moment with an infinity or NaN, or None."""
    for name, tensor in tensors_of({key: state[key] for key in ("model", "optimizer") if key in state}):
        if tensor.is_floating_point():
            # the sum is finite only if all values are, and takes a third of the time of isfinite()
            total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
            if not total.isfinite() and not tensor.isfinite().all():
                return name
    return None


def rng_state() -> dict[str, Any]:
    """Return the state of the random generators of Python, NumPy and torch."""
    name, keys, *others = np.random.get_state()
    numpy_state = (name, torch.from_numpy(keys.astype(np.int64)), *others)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(
    state: dict[str, Any],
    set_python: Callable[..., object] = random.setstate,
    set_numpy: Callable[..., object] = np.random.set_state,
    set_torch: Callable[[torch.Tensor, list[torch.Tensor]], object] | None = None,
) -> None:
    """Restore a state of `rng_state`; CUDA's only if the number of devices is the same.

    The functions set other generators than the process's own. ValueError if a state cannot be set.
    """
    try:
        set_python(state["python"])
        name, keys, position, *others = state["numpy"]
        if not 0 <= position <= MT19937_WORDS:  # NumPy would read out of bounds
            raise ValueError(f"position {position}")
        set_numpy((name, keys.numpy().astype(np.uint32), position, *others))
        (set_torch or _set_torch)(state["torch"], state["cuda"])
    # each generator has its own errors for a state that it refuses
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"the state of its random generators cannot be set ({reason})") from error


def _set_torch(state: torch.Tensor, cuda: list[torch.Tensor]) -> None:
    torch.set_rng_state(state)
    if len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)


def _try_torch(state: torch.Tensor, cuda: list[torch.Tensor]) -> None:
    torch.Generator().set_state(state)
    if not fits(cuda, [torch.Tensor]):
        raise ValueError("CUDA's is no list of tensors")


def batch_sizes_of(state: dict[str, Any], settings: dict[str, Any]) -> BatchSizes | None:
    """Return the sequences in each step of the run that saved `state`; None if that is not known."""
    train = settings.get("train")
    size = train.get("global_batch_size") if isinstance(train, dict) else 0
    with contextlib.suppress(ValueError):
        sizes = BatchSizes.from_state(state, size if isinstance(size, int) else 0)
        return sizes if sizes.size(1) > 0 else None
    return None


def tokens_seen(state: dict[str, Any], settings: dict[str, Any], block_size: int) -> int | None:
    """Return the number of training tokens over all devices, None if the checkpoint does not record it."""
    train = settings.get("train")
    length = (train.get("max_seq_length") if isinstance(train, dict) else None) or block_size
    sizes, n_steps = batch_sizes_of(state, settings), state.get("step_count")
    if sizes is None or not isinstance(length, int) or not isinstance(n_steps, int):
        return None
    return sizes.sequences(n_steps) * length
