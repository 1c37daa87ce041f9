"""Export a checkpoint to a folder for Transformers, with a model card, and compare it with LitGPT."""

import gc
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from litgpt_moe.checkpoints.layout import CHECKPOINT_FILE, CONFIG_FILE
from litgpt_moe.checkpoints.reader import load_model, load_tokenizer, read_settings, read_state, trained_on
from litgpt_moe.checkpoints.state import batch_sizes_of, tensor_bytes, tokens_seen
from litgpt_moe.cli import WorkFailed
from litgpt_moe.config import MoEConfig, model_facts
from litgpt_moe.data.manifest import MANIFEST
from litgpt_moe.files import read_json, sync_files, write_json
from litgpt_moe.folders import new_folder
from litgpt_moe.interop import tokenizer_files, transformers
from litgpt_moe.interop.families import family_of
from litgpt_moe.interop.transformers import EXPERT_OUT

Rows = list[tuple[str, str]]
PROMPT = "Once upon a time"
WEIGHTS_FILE = "model.safetensors"
TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order differ by about 1e-6
N_CHECKED = 64  # tokens whose logits are compared
TEXTS = (f"{PROMPT}, a cat.", '"No!" she said.\n\nThen  two spaces.', "caf\u00e9 \U0001f431 42")


def check_packages(with_gguf: bool, is_checked: bool) -> None:
    """Raise ValueError if the flags need a package that is not installed."""
    for name, is_needed in (("transformers", is_checked), ("gguf", with_gguf)):
        if is_needed and find_spec(name) is None:
            other = ", or add --no_check" if name == "transformers" else ""
            raise ValueError(f"the package {name} is not installed; run uv sync --extra export{other}")


def write_folder(
    folder: Path, out: Path, dtype: str | None, gguf_dtype: str | None, is_checked: bool
) -> list[str]:
    """Write the checkpoint in `folder` to `out`, or nothing; return lines that report what was written.

    `dtype` is that of safetensors (None: as saved), `gguf_dtype` a key of gguf.KINDS, "same" for `dtype`, or
    None for no GGUF file.
    """
    config = MoEConfig.from_file(folder / CONFIG_FILE)
    family = family_of(config)
    gguf = import_module("litgpt_moe.interop.gguf") if gguf_dtype else None  # an optional package
    if gguf:
        gguf.check_gguf(config, folder, gguf_dtype)
    model = load_model(folder)
    weights = model.state_dict()
    kind = getattr(torch, dtype) if dtype else model.lm_head.weight.dtype
    name = str(kind).removeprefix("torch.")
    files, ids = tokenizer_files.to_hf_tokenizer(folder, config.block_size)
    files["config.json"] = transformers.to_hf_config(config, transformers.is_tied(weights), name, ids)
    renamed = {name: w.to(kind) for name, w in transformers.to_hf_weights(config, weights).items()}
    gguf_dtype = name if gguf_dtype == "same" else gguf_dtype
    gguf_name = re.sub(r"[^\w.-]", "-", f"{config.name or 'model'}-{gguf_dtype}.gguf") if gguf else None
    usage = _usage(gguf_name, files["tokenizer_config.json"]["add_bos_token"])
    card = model_card(folder, config, family.architecture, name, usage)
    size = tensor_bytes(renamed)
    lines = [f"Wrote   {out}: {family.architecture} in {name}, {size:,} bytes of weights"]
    with new_folder(out, size * (2 if gguf else 1)) as staging:
        for file, content in files.items():
            write_json(staging / file, content)
        (staging / "README.md").write_text(card, encoding="utf-8", newline="\n")
        save_file({k: w.contiguous() for k, w in renamed.items()}, staging / WEIGHTS_FILE, {"format": "pt"})
        # safetensors 0.8 creates a file that other users may not read
        (staging / WEIGHTS_FILE).chmod((staging / "README.md").stat().st_mode)
        if gguf and gguf_name:
            gguf.write_gguf(staging / gguf_name, config, renamed, staging, gguf_dtype)
            lines.append(f"GGUF    {out / gguf_name}")
        if is_checked:
            lines.append(check_folder(staging, folder, kind))
        sync_files(staging)
    return lines


def check_folder(out: Path, folder: Path, dtype: torch.dtype) -> str:
    """Return a line on the difference between Transformers and LitGPT; WorkFailed if it is too large.

    Both compute in float32, with the weights rounded to `dtype`.
    """
    import transformers  # optional, and its import takes seconds

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(out, local_files_only=True),
        load_tokenizer(folder),
    )
    for text in TEXTS:
        if theirs(text).input_ids != ours.encode(text).tolist():
            differ = f"{folder}: AutoTokenizer gives other ids than LitGPT for {text!r}"
            raise WorkFailed(f"{differ}; nothing was written")
    model = load_model(folder).float()
    for name, weight in model.named_parameters():
        # as they were written: rounded after the multiplication
        factor = model.config.routed_scaling_factor if EXPERT_OUT.search(name) else 1.0
        weight.copy_((weight * factor).to(dtype).float() / factor)
    n_tokens = min(N_CHECKED, model.max_seq_length)
    tokens = torch.randint(model.config.vocab_size, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, got = model(tokens), _logits_of_transformers(out, tokens)
    worst, scale = (expected - got).abs().max().item(), expected.abs().max().item()
    if not worst <= TOLERANCE * max(scale, 1.0):
        differ = f"{folder}: Transformers' logits differ by {worst:.2g} from LitGPT's (largest {scale:.2g})"
        raise WorkFailed(f"{differ}; nothing was written. --no_check writes it nevertheless")
    version = f"Transformers {transformers.__version__}"
    return f"Checked {version} gives the same token ids, and logits within {worst:.1e} (largest {scale:.1f})"


def _logits_of_transformers(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    import transformers  # optional, and its import takes seconds

    load = transformers.AutoModelForCausalLM.from_pretrained
    logits = load(folder, dtype=torch.float32, local_files_only=True).eval()(tokens).logits
    # the model is in a cycle of references, and Windows neither renames nor deletes a file that is mapped
    gc.collect()
    return logits


def model_card(folder: Path, config: MoEConfig, architecture: str, dtype: str, usage: str) -> str:
    """Return the README.md for the checkpoint in `folder`."""
    settings = read_settings(folder)
    header = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- litgpt"]
    header += ["- mixture-of-experts"] if config.n_expert else []
    sections = [
        "\n".join(["---", *header, "---"]),
        f"# {_one_line(config.name)}",
        f"A small {'Mixture-of-Experts ' if config.n_expert else ''}language model, pretrained with LitGPT. "
        "It continues a text in the manner of those it was trained on; it follows no instructions.",
        _table(_shape_rows(config, architecture, dtype)),
        "## Training",
        _table(_training_rows(folder, config, settings)) if settings else "Not recorded in the checkpoint.",
        "## Use",
        usage,
    ]
    return "\n\n".join(sections) + "\n"


def _table(rows: Rows) -> str:
    cells = ((name, _one_line(value).replace("|", "\\|")) for name, value in rows)
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in cells)])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _usage(gguf_name: str | None, adds_bos: bool) -> str:
    text = f"""\
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
        text += f'\n\nWith llama.cpp: `llama-completion -m {gguf_name} -p "{PROMPT}" -n 200 --temp 0.8`'
    # lm-eval 0.4.13: HFLM.loglikelihood_rolling puts prefix_token_id before what the tokenizer returns
    argument = ",add_bos_token=False" if adds_bos else ""
    text += "\n\nWith lm-eval, perplexity and bits per byte of a text: "
    text += f"`lm_eval --model hf --model_args pretrained=.{argument} --tasks wikitext`."
    if adds_bos:
        text += " lm-eval adds BOS itself; without `add_bos_token=False` the tokenizer adds a second one, "
        text += "which makes the figures worse. Tasks with a context (multiple choice) need no argument."
    return text


def _shape_rows(config: MoEConfig, architecture: str, dtype: str) -> Rows:
    facts = model_facts(config)
    active = f", of which {facts.active_params:,} are active for a token" if config.n_expert else ""
    rows = [
        ("Class", f"`{architecture}`"),
        ("Parameters", f"{facts.total_params:,}{active}"),
        ("Layers", f"{config.n_layer} of width {config.n_embd}, {config.n_head} heads"),
    ]
    if config.n_expert:
        experts = f"{config.n_expert} of width {config.moe_intermediate_size} in a layer"
        rows.append(("Experts", f"{experts}, {config.n_expert_per_token} chosen for each token"))
    return [
        *rows,
        ("Context", f"{config.block_size:,} tokens"),
        ("Vocabulary", f"{config.vocab_size:,} pieces"),
        ("Weights", dtype),
    ]


def _training_rows(folder: Path, config: MoEConfig, settings: dict[str, Any]) -> Rows:
    """Return rows about the run that made the checkpoint, as far as its files have them."""
    state = read_state(folder / CHECKPOINT_FILE)
    optimizer = _group(settings, "optimizer")
    rows = []
    if (tokens := tokens_seen(state, settings, config.block_size)) is not None:
        steps, sizes = state["step_count"], batch_sizes_of(state, settings)
        each = f"of {tokens // max(steps, 1):,}" + (" on average" if sizes and len(sizes.changes) > 1 else "")
        rows.append(("Tokens", f"{tokens:,} in {steps:,} steps {each}"))
    if data := _describe_data(settings):
        rows.append(("Data", data))
    if optimizer.get("class_path"):
        rate = _group(optimizer, "init_args").get("lr")
        name = str(optimizer["class_path"]).rpartition(".")[2]
        rows.append(("Optimizer", name + (f", learning rate {rate:g}" if isinstance(rate, float) else "")))
    warmup = _group(settings, "train").get("lr_warmup_steps")
    if isinstance(warmup, int) and warmup:
        rows.append(("Warm-up", f"{warmup:,} steps"))
    balance = {key: n for key, n in _group(settings, "moe").items() if type(n) in (int, float)}
    if numbers := [f"{key} {n:g}" for key, n in balance.items() if 0 < n < 1e300]:
        rows.append(("Balance", ", ".join(numbers)))
    return rows + [(key.capitalize(), str(settings[key])) for key in ("precision", "seed") if key in settings]


def _group(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a group of settings; a file of other people's may hold anything in its place."""
    group = settings.get(name)
    return group if isinstance(group, dict) else {}


def _describe_data(settings: dict[str, Any]) -> str | None:
    """Return what is known of the training text; of its folder only the name, not the path."""
    if (folder := trained_on(settings)) is None:
        return None
    try:
        split = read_json(folder / MANIFEST)["splits"]["train"]
        files = [Path(entry["path"]).name for entry in split["text"]]
        counts = f"{split['n_stories']:,} texts, {split['n_tokens']:,} tokens"
    except (OSError, ValueError, KeyError, TypeError):  # the data have moved, only the name is known
        return f"`{folder.name}`"
    return f"`{folder.name}` ({', '.join(files[:3])}{' ...' if len(files) > 3 else ''}): {counts}"
