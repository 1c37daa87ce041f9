"""Print the stories that one training step of a run saw, to look into a loss spike or a surprising gradient.

Run: uv run python tools/show_batch.py checkpoints --step 1200     (10 s, most of it imports)

logs/spikes.csv of a run names the steps worth a look. Works on a run that is still going.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt_moe.cli import FlagParser, run_command, run_script
from litgpt_moe.data.settings import DEFAULT_DATA_DIR

if TYPE_CHECKING:
    from litgpt_moe.data.batches import TokenBatches

OWN_DATA = "prepare_data.TextShards"  # as train_config.yaml names our data module


def data_dir_of(checkpoint_dir: Path, settings: dict[str, Any]) -> Path:
    """Return the run's data directory; a relative one is looked for where the run was started, then here."""
    init_args = settings["data"].get("init_args") or {}
    named = Path(init_args.get("train_data_path", DEFAULT_DATA_DIR / "train")).parent
    if settings.get("dataset_dir"):
        named = Path(settings["dataset_dir"])
    run_dir, out_dir = checkpoint_dir.resolve().parent, Path(settings.get("out_dir") or "")
    is_relative = out_dir.parts and run_dir.parts[-len(out_dir.parts) :] == out_dir.parts
    start = run_dir.parents[len(out_dir.parts) - 1] if is_relative else Path()
    return start / named if (start / named).exists() else named


def batches_at(checkpoint_dir: Path, step: int, data_dir: Path | None) -> "TokenBatches":
    """Return the run's training batches, one optimizer step each, positioned before `step`."""
    from litgpt_moe.checkpoints.layout import CONFIG_FILE, SETTINGS_FILE
    from litgpt_moe.config import MoEConfig
    from litgpt_moe.data.batches import TokenBatches, TokenStream
    from litgpt_moe.data.manifest import MANIFEST
    from litgpt_moe.yaml_files import read_mapping

    settings = read_mapping(checkpoint_dir / SETTINGS_FILE)
    data, train = settings.get("data") or {}, settings.get("train") or {}
    if data.get("class_path") != OWN_DATA:
        raise ValueError(f"{checkpoint_dir}: its data is {data.get('class_path')}, not {OWN_DATA}")
    data_dir = data_dir or data_dir_of(checkpoint_dir, settings)
    if not (data_dir / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{data_dir / MANIFEST}: not found; name the run's data directory with --data_dir"
        )
    block_size = train.get("max_seq_length") or MoEConfig.from_file(checkpoint_dir / CONFIG_FILE).block_size
    seed = (data.get("init_args") or {}).get("seed", settings.get("seed"))
    # the order of the data depends on neither the micro-batch nor the devices: one batch here is one step
    n_sequences = train["global_batch_size"]
    batches = TokenBatches(TokenStream(data_dir, "train"), n_sequences, block_size, seed)
    n_steps = train["max_tokens"] // (n_sequences * block_size)
    if not 1 <= step <= n_steps:
        raise ValueError(f"--step is {step}; choose 1 to {n_steps}, the steps of {checkpoint_dir.parent}")
    epoch, n_used = divmod((step - 1) * n_sequences, batches.n_sequences)
    batches.load_state_dict({"epoch": epoch, "n_used": n_used, "n_sequences": batches.n_sequences})
    return batches


def show(run: Path, step: int, data_dir: Path | None) -> None:
    """Print the stories of the step."""
    from litgpt import Tokenizer

    from litgpt_moe.checkpoints.layout import find_checkpoint

    checkpoint_dir = find_checkpoint(run)
    batches = batches_at(checkpoint_dir, step, data_dir)
    tokenizer = Tokenizer(checkpoint_dir)
    for number, ids in enumerate(next(iter(batches)), 1):
        print(f"--- step {step}, sequence {number} of {batches.batch_size}\n{tokenizer.decode(ids)}\n")


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, or 2 after a sentence on what cannot be read."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run's out_dir, or one of its checkpoints")
    parser.add_argument("--step", type=int, required=True, help="optimizer step, 1 is the first")
    parser.add_argument("--data_dir", type=Path, help="where its data is now (default: where it was)")
    args = parser.parse_args(argv)
    return run_command(lambda: show(args.run, args.step, args.data_dir), "stopped")


if __name__ == "__main__":
    raise SystemExit(run_script(main))
