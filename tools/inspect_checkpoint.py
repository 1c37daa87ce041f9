"""Say what a checkpoint directory holds and whether it is whole.

Run: uv run python tools/inspect_checkpoint.py checkpoints/final --tensors (20 s, most of it imports)

The weights are memory-mapped and never run code (`weights_only`); only --tensors reads their values.
Status 0: complete. 1: something is missing or damaged. 2: no checkpoint there.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt_moe.cli import FlagParser

if TYPE_CHECKING:
    import torch

    from moe_layers import MoEConfig

NEEDED = {
    "lit_model.pth": "the weights",
    "model_config.yaml": "the model's shape",
    "tokenizer.json": "the tokenizer",
    "tokenizer_config.json": "its special tokens",
}
KEPT = {
    "checkpoint.json": "the digests of all files",
    "train_config.yaml": "the settings of the run",
    "generation_config.json": "its special tokens' ids",
}
COUNTERS = ("iter_num", "step_count")
SETTINGS = ("seed", "precision", "devices", "num_nodes", "tokenizer_dir", "dataset_dir")


def describe_files(folder: Path) -> list[str]:
    """Return a line per expected or present file: its size, or that it is missing."""
    known = {**NEEDED, **KEPT}
    others = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name not in known)
    lines = []
    for name in [*known, *others]:
        path = folder / name
        state = f"{path.stat().st_size:>15,} bytes" if path.is_file() else f"{'MISSING':>21}"
        lines.append(f"  {name:<24}{state}  {known.get(name, '')}".rstrip())
    return lines


def describe_record(folder: Path) -> str:
    """Return a line on checkpoint.json, whose digests `verify_checkpoint` has compared."""
    path = folder / "checkpoint.json"
    if not path.is_file():
        return "no digests to verify (LitGPT's own checkpoints have none)"
    record = json.loads(path.read_bytes())
    step, n_files = record.get("step"), len(record["files"])
    return f"verified: {n_files} files are as checkpoint.json recorded them at step {step}"


def describe_model(config: "MoEConfig", weights: dict[str, "torch.Tensor"]) -> list[str]:
    """Return lines on the model's shape, its parameters and their dtype."""
    from moe_layers import count_parameters

    total, active = count_parameters(config)
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()})
    moe = (
        f"  {config.n_expert} experts of width {config.moe_intermediate_size} in a MoE layer,"
        f" {config.n_expert_per_token} per token"
    )
    return [
        f"  {config.name}: {config.n_layer} layers of width {config.n_embd}, {config.n_head} heads",
        moe if config.n_expert else "  no experts",
        f"  context {config.block_size}, vocabulary {config.vocab_size} (padded {config.padded_vocab_size})",
        f"  {total:,} parameters, {active:,} active per token, in {', '.join(dtypes)}",
    ]


def describe_progress(state: dict[str, Any], settings: dict[str, Any], block_size: int) -> list[str]:
    """Return lines on how far training was: counters, tokens seen, what else the file carries."""
    lines = [f"  {name} {state[name]:,}" for name in COUNTERS if isinstance(state.get(name), int)]
    tokens = tokens_seen(state, settings, block_size)
    if tokens is not None:
        lines.append(f"  tokens seen {tokens:,}")
    extras = [key for key in state if key not in ("model", *COUNTERS)]
    lines.append(
        f"  can be resumed, it carries {', '.join(extras)}" if extras else "  weights only, cannot be resumed"
    )
    return lines


def tokens_seen(state: dict[str, Any], settings: dict[str, Any], block_size: int) -> int | None:
    """Return the tokens trained on over all devices; None where that is not recorded."""
    train = settings.get("train") or {}
    steps, batch = state.get("step_count"), train.get("global_batch_size")
    if not isinstance(steps, int) or not isinstance(batch, int):
        return None
    return steps * batch * (train.get("max_seq_length") or block_size)


def describe_settings(settings: dict[str, Any]) -> list[str]:
    """Return lines on the settings of the run that train_config.yaml keeps."""
    lines = [f"  {key}: {settings[key]}" for key in SETTINGS if settings.get(key) is not None]
    for section in ("train", "optimizer", "data"):
        if settings.get(section):
            lines.append(f"  {section}: {settings[section]}")
    return lines or ["  none recorded"]


def describe_tensors(weights: dict[str, "torch.Tensor"]) -> list[str]:
    """Return a table: name, shape, dtype, mean, standard deviation and how many values are not finite."""
    width = max(map(len, weights), default=4)
    lines = [f"  {'name':<{width}} {'shape':>16} {'dtype':>9} {'mean':>11} {'std':>10}  not finite"]
    for name, weight in weights.items():
        values = weight.double()  # one tensor at a time: the file may be larger than the memory
        bad = int((~values.isfinite()).sum())
        spread = values.std(unbiased=False).item()
        shape, dtype = "x".join(map(str, weight.shape)), str(weight.dtype).removeprefix("torch.")
        lines.append(
            f"  {name:<{width}} {shape:>16} {dtype:>9}"
            f" {values.mean().item():>11.3e} {spread:>10.3e}  {bad or '-'}"
        )
    return lines


def find_problems(folder: Path, config: "MoEConfig") -> list[str]:
    """Return what generate and evaluate would miss, one sentence each; [] for a complete directory."""
    from generate import read_tokenizer
    from moe_layers import load_model

    problems = [f"{name} is missing ({why})" for name, why in NEEDED.items() if not (folder / name).is_file()]
    load_model(folder, device="meta")  # names and shapes against the configuration, no memory
    if not problems:
        tokenizer = read_tokenizer(folder)
        if tokenizer.vocab_size > config.padded_vocab_size:
            problems.append(
                f"tokenizer has {tokenizer.vocab_size} pieces, the model {config.padded_vocab_size}"
            )
        if tokenizer.eos_id is None:
            problems.append("tokenizer_config.json names no eos_token, so generation never stops by itself")
    return problems


def describe_tokenizer(folder: Path) -> list[str]:
    """Return a line on the tokenizer, as LitGPT reads it."""
    if not (folder / "tokenizer.json").is_file():
        return ["  none"]
    from generate import read_tokenizer

    tokenizer = read_tokenizer(folder)
    return [f"  {tokenizer.vocab_size} pieces, bos {tokenizer.bos_id}, eos {tokenizer.eos_id}"]


def inspect(folder: Path, with_tensors: bool) -> list[str]:
    """Print everything about the checkpoint in `folder` and return its problems.

    Raises:
        ValueError: the weights or a configuration are damaged, or do not belong together.
    """
    from moe_layers import MoEConfig, read_state, read_weights, verify_checkpoint

    verify_checkpoint(folder)
    print("\n".join([f"{folder}", *describe_files(folder), describe_record(folder)]))
    config = MoEConfig.from_file(folder / "model_config.yaml")
    weights = read_weights(folder / "lit_model.pth")
    state = read_state(folder / "lit_model.pth")  # the same file, for what lies beside the weights
    settings = _read_settings(folder / "train_config.yaml")
    sections = {
        "model": describe_model(config, weights),
        "training": describe_progress(state if "model" in state else {}, settings, config.block_size),
        "settings": describe_settings(settings),
        "tokenizer": describe_tokenizer(folder),
    }
    if with_tensors:
        sections["tensors"] = describe_tensors(weights)
    for title, lines in sections.items():
        print("\n".join([f"{title}:", *lines]))
    return find_problems(folder, config)


def _read_settings(path: Path) -> dict[str, Any]:
    from litgpt_moe.yaml_files import read_mapping

    return read_mapping(path) if path.is_file() else {}


def main(argv: list[str] | None = None) -> int:
    """Print what the checkpoint holds; 0 when it is complete, 1 when not, 2 when there is none."""
    parser = FlagParser(description=__doc__)
    parser.add_argument(
        "dir", type=Path, help="a checkpoint directory, or an out_dir (then its final or newest)"
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor with mean, std, bad values")
    args = parser.parse_args(argv)
    from moe_layers import find_checkpoint

    try:
        folder = find_checkpoint(args.dir)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        problems = inspect(folder, args.tensors)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # JSON or YAML of another shape than it should have
        print(f"error: {folder}: a tokenizer or settings file is damaged ({error!r})", file=sys.stderr)
        return 1
    for problem in problems:
        print(f"incomplete: {problem}")
    if not problems:
        print("complete: generate and evaluate need nothing else")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
