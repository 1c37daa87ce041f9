"""Convert a checkpoint to a folder for Hugging Face Transformers, with --gguf also to a file for llama.cpp.

Run: uv run python tools/export_hf.py checkpoints/final exported      (25 s, most of it imports)

The folder holds model.safetensors, config.json, generation_config.json, the tokenizer and a model card. The
class is the one with the same routing: Mixtral, or Qwen3-MoE for q/k-norm (Llama and Qwen3 without experts);
other models are refused. Before the folder gets its name, Transformers loads it and must give the
checkpoint's logits and token ids.
"""

import argparse
from pathlib import Path

from litgpt_moe.cli import FlagParser, run_command, run_script


def export(args: argparse.Namespace) -> str:
    """Export the checkpoint; return the lines to print."""
    from litgpt_moe.checkpoints.layout import find_checkpoint
    from litgpt_moe.checkpoints.reader import load_tokenizer, verify_checkpoint
    from litgpt_moe.files import check_new_folder
    from litgpt_moe.interop.export_folder import check_packages, write_folder

    check_packages(args.gguf, not args.no_check)
    check_new_folder(args.out, 0)
    folder = find_checkpoint(args.checkpoint)
    verify_checkpoint(folder)
    load_tokenizer(folder)
    lines = write_folder(folder, args.out, args.dtype, args.gguf, not args.no_check)
    lines.append(f"Next:\n  read {args.out / 'README.md'} and add a licence")
    lines.append(f"  uv run hf upload YOUR_NAME/{args.out.absolute().name} {args.out}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work, 2 for bad input, 130 after Ctrl-C."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="a checkpoint directory, or an out_dir (then its final or newest)")
    add("out", type=Path, help="folder to make; must not exist, or be empty")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, help="of the weights (default: as in the checkpoint)")
    add("--gguf", action="store_true", help="also write OUT/NAME.gguf for llama.cpp")
    add("--no_check", action="store_true", help="do not load the result with Transformers and compare")
    args = parser.parse_args(argv)
    return run_command(lambda: export(args))


if __name__ == "__main__":
    raise SystemExit(run_script(main))
