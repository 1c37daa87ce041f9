"""Print the stories that one training step of a run saw, to look into a loss spike or a surprising gradient.

Run: uv run python tools/show_batch.py checkpoints --step 1200     (10 s, most of it imports)

logs/spikes.csv of a run names the steps worth a look. Works on a run that is still going.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import prepare_data
from litgpt_moe.cli import FlagParser


def data_dir_of(checkpoint_dir: Path, settings: dict[str, Any]) -> Path:
    """Return the run's data directory: a relative one is looked for where the run was started, then here."""
    init_args = settings["data"].get("init_args") or {}
    named = Path(init_args.get("train_data_path", prepare_data.PrepareSettings.data_dir / "train")).parent
    if settings.get("dataset_dir"):
        named = Path(settings["dataset_dir"])
    run_dir, out_dir = checkpoint_dir.resolve().parent, Path(settings.get("out_dir") or "")
    is_relative = out_dir.parts and run_dir.parts[-len(out_dir.parts) :] == out_dir.parts
    start = run_dir.parents[len(out_dir.parts) - 1] if is_relative else Path()
    return start / named if (start / named).exists() else named


def batches_of(checkpoint_dir: Path, data_dir: Path | None = None) -> prepare_data.TokenBatches:
    """Return the run's training batches, one optimizer step each.

    Raises:
        ValueError: the run did not train on our data module, or its data has changed since.
        OSError: a file is missing.
    """
    from litgpt_moe.yaml_files import read_mapping
    from moe_layers import CONFIG_FILE, MoEConfig

    settings = read_mapping(checkpoint_dir / "train_config.yaml")
    data, train = settings.get("data") or {}, settings.get("train") or {}
    if data.get("class_path") != "prepare_data.TextShards":
        raise ValueError(
            f"{checkpoint_dir}: its data is {data.get('class_path')}, not prepare_data.TextShards"
        )
    manifest = (data_dir or data_dir_of(checkpoint_dir, settings)) / prepare_data.MANIFEST
    if not manifest.is_file():
        raise FileNotFoundError(f"{manifest}: not found; name the run's data directory with --data_dir")
    block_size = train.get("max_seq_length") or MoEConfig.from_file(checkpoint_dir / CONFIG_FILE).block_size
    seed = (data.get("init_args") or {}).get("seed", settings.get("seed"))
    stream = prepare_data.TokenStream(manifest.parent, "train")
    return prepare_data.TokenBatches(stream, train["global_batch_size"], block_size, seed)


def check_step(step: int, checkpoint_dir: Path, tokens_per_step: int) -> None:
    """Raise ValueError if the run, as its newest checkpoint has it, is shorter."""
    from litgpt_moe.yaml_files import read_mapping

    n_steps = read_mapping(checkpoint_dir / "train_config.yaml")["train"]["max_tokens"] // tokens_per_step
    if not 1 <= step <= n_steps:
        raise ValueError(f"--step is {step}; choose 1 to {n_steps}, the steps of {checkpoint_dir.parent}")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run's out_dir, or one of its checkpoints")
    parser.add_argument("--step", type=int, required=True, help="optimizer step, 1 is the first")
    parser.add_argument("--data_dir", type=Path, help="where its data is now (default: where it was)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Return 0, or 2 after a message on what cannot be read."""
    args = build_parser().parse_args(argv)
    try:
        from litgpt import Tokenizer

        from moe_layers import find_checkpoint

        checkpoint_dir = find_checkpoint(args.run)
        batches = batches_of(checkpoint_dir, args.data_dir)
        check_step(args.step, checkpoint_dir, batches.batch_size * batches.block_size)
        tokenizer = Tokenizer(checkpoint_dir)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # the flow is the same for any micro-batch and any number of devices: one batch here is one step
    used = (args.step - 1) * batches.batch_size
    batches.load_state_dict(
        {
            "epoch": used // batches.n_sequences,
            "n_used": used % batches.n_sequences,
            "n_sequences": batches.n_sequences,
        }
    )
    for number, ids in enumerate(next(iter(batches)), 1):
        print(f"--- step {args.step}, sequence {number} of {batches.batch_size}\n{tokenizer.decode(ids)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
