"""Convert a checkpoint to a folder for Hugging Face Transformers, with --gguf also to a file for llama.cpp.

Run: uv run python tools/export_hf.py checkpoints/final exported      (25 s, most of it imports)

The folder holds model.safetensors, config.json, generation_config.json, the tokenizer and a model card. The
class is the one with the same routing: Mixtral, or Qwen3-MoE for q/k-norm (Llama and Qwen3 without experts);
other models are refused. Before the folder gets its name, Transformers loads it and must give the
checkpoint's logits and token ids.
"""

import argparse
import sys
from pathlib import Path

from litgpt_moe.cli import command_line, run_command, run_script
from litgpt_moe.flags import FlagParser

GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")


def export(args: argparse.Namespace) -> str:
    """Export the checkpoint; return the lines to print."""
    from litgpt_moe.checkpoints.layout import check_new_place, find_checkpoint
    from litgpt_moe.checkpoints.reader import load_tokenizer, verify_checkpoint
    from litgpt_moe.interop.export_folder import check_packages, write_folder

    check_packages(bool(args.gguf), not args.no_check)
    check_new_place(args.out)
    folder = find_checkpoint(args.ckpt_dir)
    verify_checkpoint(folder)
    load_tokenizer(folder)
    lines = write_folder(folder, args.out, args.dtype, args.gguf, not args.no_check)
    lines.append(f"Next:\n  read {args.out / 'README.md'} and add a licence")
    lines.append(f"  uv run hf upload {command_line(f'YOUR_NAME/{args.out.absolute().name}', args.out)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work, 2 for bad input, 130 after Ctrl-C."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add("--ckpt_dir", type=Path, help="a checkpoint directory, or an out_dir (then its final or newest)")
    parser.accept_positional("ckpt_dir", is_required=True)
    add("out", type=Path, help="folder to make; must not exist, or be empty")
    dtypes = ("float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, help="of the weights (default: as in the checkpoint)")
    gguf = "also write OUT/NAME.gguf for llama.cpp; q8_0 has 8 bits a weight (default: as --dtype)"
    metavar = "{" + ",".join(GGUF_TYPES) + "}"
    add("--gguf", nargs="?", const="same", choices=("same", *GGUF_TYPES), metavar=metavar, help=gguf)
    add("--no_check", action="store_true", help="do not load the result with Transformers and compare")
    words = sys.argv[1:] if argv is None else argv
    # `--gguf CHECKPOINT OUT`, without a type, is older than the types
    pairs = zip(words, [*words[1:], ""], strict=True)
    args = parser.parse_args(
        [f"{word}=same" if word == "--gguf" and after not in GGUF_TYPES else word for word, after in pairs]
    )
    return run_command(lambda: export(args))


if __name__ == "__main__":
    raise SystemExit(run_script(main))
