"""Print the stories of one training step of a run, to look into a loss spike or an unexpected gradient.

Run: uv run python tools/show_batch.py checkpoints --step 1200     (10 s, most of it imports)

logs/spikes.csv of a run lists the steps of interest. The run may still be training.
"""

import sys
from pathlib import Path
from typing import Any

from litgpt_moe.cli import printable, run_command, run_script, say
from litgpt_moe.data.settings import DEFAULT_DATA_DIR
from litgpt_moe.files import fits, path_of_any_system
from litgpt_moe.flags import FlagParser
from litgpt_moe.terminal import wrapped


def data_dir_of(checkpoint_dir: Path, settings: dict[str, Any]) -> Path:
    """Return the run's data directory, relative to where the run was started, else to the current folder."""
    init_args = settings["data"].get("init_args") or {}
    train = init_args.get("train_data_path") or f"{DEFAULT_DATA_DIR.as_posix()}/train"
    # its name in earlier versions is dataset_dir
    name = settings.get("data_dir") or settings.get("dataset_dir")
    if (named := path_of_any_system(name or train)) is None:
        raise ValueError(f"{name or train} is a network share, read only where you name it: --data_dir")
    named = named if name else named.parent
    run_dir = checkpoint_dir.resolve().parent
    out_dir = path_of_any_system(settings.get("out_dir") or "") or Path()
    is_relative = out_dir.parts and run_dir.parts[-len(out_dir.parts) :] == out_dir.parts
    start = run_dir.parents[len(out_dir.parts) - 1] if is_relative else Path()
    return start / named if (start / named).exists() else named


def check_settings(settings: dict[str, Any], path: Path) -> None:
    """Raise ValueError if a value of a checkpoint's settings that is read here is of a wrong type."""
    from litgpt_moe.yaml_files import must_be, type_words

    # a group stands before its keys
    forms: dict[str, Any] = {"data": {}, "data.init_args": {}, "data.init_args.train_data_path": str}
    forms |= {"data.init_args.seed": 0, "seed": 0, "data_dir": str, "dataset_dir": str}
    forms |= {"out_dir": str, "train": {}, "train.max_seq_length": 1, "train.max_tokens": 1}
    for key, form in forms.items():
        value: Any = settings
        for name in key.split("."):
            value = value.get(name) if value else None
        if value is not None and not fits(value, form):
            words = type_words(form if isinstance(form, type) else type(form))
            raise ValueError(f"{path}: {must_be(key, value, words)}")
    if (settings.get("train") or {}).get("max_tokens") is None:
        raise ValueError(f"{path}: train.max_tokens is missing; put it back")


def show(run: Path, step: int, data_dir: Path | None) -> None:
    """Print the stories of the step."""
    from litgpt_moe.checkpoints.layout import CHECKPOINT_FILE, CONFIG_FILE, SETTINGS_FILE, find_checkpoint
    from litgpt_moe.checkpoints.reader import load_tokenizer, read_state
    from litgpt_moe.checkpoints.state import batch_sizes_of
    from litgpt_moe.config import MoEConfig
    from litgpt_moe.data.batches import TokenBatches, TokenStream
    from litgpt_moe.data.manifest import MANIFEST
    from litgpt_moe.yaml_files import read_mapping

    checkpoint_dir = find_checkpoint(run)
    settings = read_mapping(checkpoint_dir / SETTINGS_FILE, is_foreign=True)
    check_settings(settings, checkpoint_dir / SETTINGS_FILE)
    data, train = settings.get("data") or {}, settings.get("train") or {}
    if (name := data.get("class_path")) != "prepare_data.TextShards":
        raise ValueError(f"{checkpoint_dir}: its data is {name}, not prepare_data.TextShards")
    data_dir = data_dir or data_dir_of(checkpoint_dir, settings)
    if not (data_dir / MANIFEST).is_file():
        missing = f"{data_dir / MANIFEST}: not found"
        raise FileNotFoundError(f"{missing}; name the run's data directory with --data_dir")
    block_size = train.get("max_seq_length") or MoEConfig.from_file(checkpoint_dir / CONFIG_FILE).block_size
    seed = (data.get("init_args") or {}).get("seed", settings.get("seed"))
    # micro-batch and devices have no influence on the order of the data: one batch here is one step
    if (sizes := batch_sizes_of(read_state(checkpoint_dir / CHECKPOINT_FILE), settings)) is None:
        raise ValueError(f"{checkpoint_dir / SETTINGS_FILE}: train.global_batch_size is missing; put it back")
    n_steps = sizes.steps(train["max_tokens"] // block_size)
    if not 1 <= step <= n_steps:
        raise ValueError(f"--step is {step}; choose 1 to {n_steps}, the steps of {checkpoint_dir.parent}")
    n_sequences = sizes.size(step)
    batches = TokenBatches(TokenStream(data_dir, "train"), n_sequences, block_size, seed)
    batches.n_taken = sizes.sequences(step - 1)
    tokenizer = load_tokenizer(checkpoint_dir)
    for number, ids in enumerate(next(iter(batches)), 1):
        text = f"--- step {step}, sequence {number} of {n_sequences}\n{tokenizer.decode(ids)}\n"
        say(wrapped(printable(text), sys.stdout) if sys.stdout.isatty() else text)


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, or 2 after a sentence on what cannot be read."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("--ckpt_dir", type=Path, help="a run's out_dir, or one of its checkpoints")
    parser.accept_positional("ckpt_dir", is_required=True)
    parser.add_argument("--step", type=int, required=True, help="optimizer step, 1 is the first")
    parser.add_argument("--data_dir", type=Path, help="where its data is now (default: where it was)")
    args = parser.parse_args(argv)
    return run_command(lambda: show(args.ckpt_dir, args.step, args.data_dir), "stopped")


if __name__ == "__main__":
    raise SystemExit(run_script(main))
