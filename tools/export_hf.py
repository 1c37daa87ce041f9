"""Turn a checkpoint into a folder that Hugging Face Transformers loads, and --gguf into a file for llama.cpp.

Run: uv run python tools/export_hf.py checkpoints/final exported      (25 s, most of it imports)

Written are model.safetensors, config.json, generation_config.json, the tokenizer and a model card. The class
is the one whose routing is the same: Mixtral, or Qwen3-MoE for q/k-norm (Llama and Qwen3 without experts);
what neither can express is refused. Before the folder gets its name, Transformers loads it and must give the
checkpoint's logits and token ids.
"""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt_moe.cli import FlagParser

if TYPE_CHECKING:
    import torch

    from moe_layers import MoEConfig

WEIGHTS_FILE = "model.safetensors"
DTYPES = ("float32", "bfloat16", "float16")
TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order differ by about 1e-6
N_CHECKED = 64  # tokens whose logits are compared
PROMPT = "Once upon a time"
TEXTS = (
    f"{PROMPT}, there was a cat.",
    '"No!" she said.\n\nThen  two spaces.',
    "caf\u00e9 \U0001f431 42",
)


# --- the model card -----------------------------------------------------------------------------------------


def model_card(
    folder: Path, config: "MoEConfig", architecture: str, gguf_name: str | None, dtype: str
) -> str:
    """Return README.md: what the checkpoint's own files tell about the model, and how to use it."""
    from litgpt_moe.yaml_files import read_mapping
    from moe_layers import count_parameters

    total, active = count_parameters(config)
    settings = {}
    if (folder / "train_config.yaml").is_file():
        settings = read_mapping(folder / "train_config.yaml")
    shape = [
        ("Class", f"`{architecture}`"),
        (
            "Parameters",
            f"{total:,}" + (f", of which {active:,} are active for a token" if config.n_expert else ""),
        ),
        ("Layers", f"{config.n_layer} of width {config.n_embd}, {config.n_head} heads"),
    ]
    if config.n_expert:
        experts = f"{config.n_expert} of width {config.moe_intermediate_size} in a layer"
        shape.append(("Experts", f"{experts}, {config.n_expert_per_token} chosen for each token"))
    shape += [
        ("Context", f"{config.block_size:,} tokens"),
        ("Vocabulary", f"{config.vocab_size:,} pieces"),
        ("Weights", dtype),
    ]
    sections = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- litgpt\n"
        + ("- mixture-of-experts\n" if config.n_expert else "")
        + "---",
        f"# {config.name}",
        f"A small {'Mixture-of-Experts ' if config.n_expert else ''}language model, pretrained with LitGPT. "
        "It continues a text in the manner of those it was trained on; it follows no instructions.",
        _table(shape),
        "## Training",
        _table(training_facts(folder, config, settings)) if settings else "Not recorded in the checkpoint.",
        "## Use",
        _usage(gguf_name),
    ]
    return "\n\n".join(sections) + "\n"


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def _usage(gguf_name: str | None) -> str:
    code = f"""\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # or the name of its repository
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
ids = tokenizer({PROMPT!r}, return_tensors="pt", return_token_type_ids=False)
out = model.generate(**ids, max_new_tokens=200, do_sample=True, temperature=0.8, top_k=50)
print(tokenizer.decode(out[0], skip_special_tokens=True))
```"""
    if gguf_name:
        code += f'\n\nWith llama.cpp: `llama-completion -m {gguf_name} -p "{PROMPT}" -n 200 --temp 0.8`'
    return code


def training_facts(folder: Path, config: "MoEConfig", settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Return rows on the run that made the checkpoint, as far as its files tell."""
    from moe_layers import CHECKPOINT_FILE, read_state
    from tools.inspect_checkpoint import tokens_seen

    state = read_state(folder / CHECKPOINT_FILE)
    optimizer, train = settings.get("optimizer") or {}, settings.get("train") or {}
    rows = []
    if (tokens := tokens_seen(state, settings, config.block_size)) is not None:
        steps = state["step_count"]
        rows.append(("Tokens", f"{tokens:,} in {steps:,} steps of {tokens // max(steps, 1):,}"))
    if data := data_facts(settings):
        rows.append(("Data", data))
    if isinstance(optimizer, dict) and optimizer.get("class_path"):
        rate = (optimizer.get("init_args") or {}).get("lr")
        name = str(optimizer["class_path"]).rpartition(".")[2]
        rows.append(("Optimizer", name + (f", learning rate {rate:g}" if isinstance(rate, float) else "")))
    if train.get("lr_warmup_steps"):
        rows.append(("Warm-up", f"{train['lr_warmup_steps']:,} steps"))
    moe = settings.get("moe") or {}
    balance = ", ".join(
        f"{key} {value:g}" for key, value in moe.items() if type(value) in (int, float) and value
    )
    rows += [("Balance", balance)] if balance else []
    rows += [(key.capitalize(), str(settings[key])) for key in ("precision", "seed") if key in settings]
    return rows


def data_facts(settings: dict[str, Any]) -> str | None:
    """Return what is known of the training text; its folder is named, but not where that lies."""
    import json

    from prepare_data import MANIFEST

    given = ((settings.get("data") or {}).get("init_args") or {}).get("train_data_path")
    if not isinstance(given, str):
        return None
    manifest = Path(given).parent / MANIFEST
    try:
        split = json.loads(manifest.read_text(encoding="utf-8"))["splits"]["train"]
        files = [Path(entry["path"]).name for entry in split["text"]]
        counts = f"{split['n_stories']:,} texts, {split['n_tokens']:,} tokens"
    except (OSError, ValueError, KeyError, TypeError):  # elsewhere by now: the name is what is left
        return f"`{Path(given).parent.name}`"
    return f"`{Path(given).parent.name}` ({', '.join(files[:3])}{' ...' if len(files) > 3 else ''}): {counts}"


# --- the folder ---------------------------------------------------------------------------------------------


def write_folder(folder: Path, out: Path, dtype: str | None, with_gguf: bool, is_checked: bool) -> list[str]:
    """Write everything to `out` and return lines that say what; nothing is left behind on an error.

    Raises:
        ValueError: the checkpoint is damaged, or no class computes the same.
        WorkFailed: the disk is full, or Transformers gives other numbers.
    """
    import torch
    from safetensors.torch import save_file

    from litgpt_moe.files import new_folder, sync_files
    from moe_layers import CONFIG_FILE, MoEConfig, load_model
    from run_train import tensor_bytes
    from tools import gguf_format, hf_format

    config = MoEConfig.from_file(folder / CONFIG_FILE)
    family = hf_format.family_of(config)
    if with_gguf:
        gguf_format.check(config, folder)
    model = load_model(folder)
    weights = {k: w.to(getattr(torch, dtype)) if dtype else w for k, w in model.state_dict().items()}
    kind = next(iter(weights.values())).dtype
    files, ids = hf_format.to_hf_tokenizer(folder, config.block_size)
    values = hf_format.to_hf_config(config, hf_format.is_tied(weights), kind, ids)
    renamed = hf_format.to_hf_weights(config, weights)
    name = str(kind).removeprefix("torch.")
    gguf_name = re.sub(r"[^\w.-]", "-", f"{config.name or 'model'}-{name}.gguf") if with_gguf else None
    files["README.md"] = model_card(folder, config, family.architecture, gguf_name, name)
    with new_folder(out, tensor_bytes(renamed) * (2 if with_gguf else 1)) as staging:
        for file_name, text in (files | {"config.json": hf_format.to_json(values)}).items():
            (staging / file_name).write_text(text, encoding="utf-8")
        save_file({k: w.contiguous() for k, w in renamed.items()}, staging / WEIGHTS_FILE, {"format": "pt"})
        (staging / WEIGHTS_FILE).chmod((staging / "config.json").stat().st_mode)  # safetensors 0.8: 0600
        size = f"{tensor_bytes(renamed):,} bytes of weights"
        lines = [f"Wrote   {out}: {family.architecture} in {name}, {size}"]
        if gguf_name:
            gguf_format.write(staging / gguf_name, config, renamed, staging)
            lines.append(f"GGUF    {out / gguf_name}")
        if is_checked:
            lines.append(check_folder(staging, folder, kind))
        sync_files(staging)
    return lines


def check_folder(out: Path, folder: Path, dtype: "torch.dtype") -> str:
    """Return a line that says how near Transformers comes to LitGPT; WorkFailed if it is not near.

    Both compute in float32, with the weights rounded to `dtype`.
    """
    import torch
    import transformers
    from litgpt.tokenizer import Tokenizer

    from litgpt_moe.cli import WorkFailed
    from moe_layers import load_model

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    theirs = transformers.AutoTokenizer.from_pretrained(out, local_files_only=True)
    ours = Tokenizer(folder)
    for text in TEXTS:
        if theirs(text).input_ids != ours.encode(text).tolist():
            raise WorkFailed(
                f"{folder}: AutoTokenizer gives other ids than LitGPT for {text!r}; nothing was written"
            )
    model = load_model(folder, dtype=dtype).float()
    copy = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, local_files_only=True
    ).eval()
    n_tokens = min(N_CHECKED, model.max_seq_length)
    tokens = torch.randint(model.config.vocab_size, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, got = model(tokens), copy(tokens).logits
    worst, scale = (expected - got).abs().max().item(), expected.abs().max().item()
    if not worst <= TOLERANCE * max(scale, 1.0):
        told = f"{folder}: Transformers' logits differ by {worst:.2g} from LitGPT's (largest {scale:.2g})"
        raise WorkFailed(f"{told}; nothing was written. --no_check writes it nevertheless")
    version = f"Transformers {transformers.__version__}"
    return f"Checked {version} gives the same token ids, and logits within {worst:.1e} (largest {scale:.1f})"


def check_needs(with_gguf: bool, is_checked: bool) -> None:
    """Raise ValueError if a package that the flags need is not installed."""
    from importlib.util import find_spec

    for name, is_needed in (("safetensors", True), ("transformers", is_checked), ("gguf", with_gguf)):
        if is_needed and find_spec(name) is None:
            other = ", or add --no_check" if name == "transformers" else ""
            raise ValueError(f"the package {name} is not installed; run uv sync --extra export{other}")


def export(args: argparse.Namespace) -> list[str]:
    """Do what the flags say and return what to print. Raises as `write_folder`."""
    from litgpt_moe.files import check_new_folder

    check_needs(args.gguf, not args.no_check)
    check_new_folder(args.out, 0)
    from generate import read_tokenizer
    from moe_layers import find_checkpoint, verify_checkpoint

    folder = find_checkpoint(args.checkpoint)
    verify_checkpoint(folder)
    read_tokenizer(folder)
    return [
        *write_folder(folder, args.out, args.dtype, args.gguf, not args.no_check),
        f"Next:\n  read {args.out / 'README.md'} and add a licence",
        f"  uv run hf upload YOUR_NAME/{args.out.absolute().name} {args.out}",
    ]


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work, 2 for bad input, 130 after Ctrl-C."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="a checkpoint directory, or an out_dir (then its final or newest)")
    add("out", type=Path, help="folder to make; must not exist, or be empty")
    add("--dtype", choices=DTYPES, help="of the weights (default: as in the checkpoint)")
    add("--gguf", action="store_true", help="also write OUT/NAME.gguf for llama.cpp")
    add("--no_check", action="store_true", help="do not load the result with Transformers and compare")
    args = parser.parse_args(argv)
    from litgpt_moe.cli import run_command

    return run_command(lambda: "\n".join(export(args)))


if __name__ == "__main__":
    raise SystemExit(main())
