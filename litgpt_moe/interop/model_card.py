"""The model card of an exported checkpoint: what its own files say about the model, and how to use it."""

from pathlib import Path
from typing import Any

from litgpt_moe.checkpoints.layout import CHECKPOINT_FILE, SETTINGS_FILE
from litgpt_moe.checkpoints.reader import read_state
from litgpt_moe.config import MoEConfig, model_facts
from litgpt_moe.data.manifest import MANIFEST
from litgpt_moe.files import read_json
from litgpt_moe.yaml_files import read_mapping

PROMPT = "Once upon a time"
Rows = list[tuple[str, str]]


def model_card(folder: Path, config: MoEConfig, architecture: str, gguf_name: str | None, dtype: str) -> str:
    """Return the README.md for the checkpoint in `folder`."""
    path = folder / SETTINGS_FILE
    settings = read_mapping(path, is_foreign=True) if path.is_file() else {}
    header = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- litgpt"]
    header += ["- mixture-of-experts"] if config.n_expert else []
    sections = [
        "\n".join(["---", *header, "---"]),
        f"# {config.name}",
        f"A small {'Mixture-of-Experts ' if config.n_expert else ''}language model, pretrained with LitGPT. "
        "It continues a text in the manner of those it was trained on; it follows no instructions.",
        _table(_shape_rows(config, architecture, dtype)),
        "## Training",
        _table(_training_rows(folder, config, settings)) if settings else "Not recorded in the checkpoint.",
        "## Use",
        _usage(gguf_name),
    ]
    return "\n\n".join(sections) + "\n"


def _table(rows: Rows) -> str:
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
    """Return rows on the run that made the checkpoint, as far as its files say."""
    state = read_state(folder / CHECKPOINT_FILE)
    optimizer, train = settings.get("optimizer") or {}, settings.get("train") or {}
    rows = []
    if (tokens := tokens_seen(state, settings, config.block_size)) is not None:
        steps = state["step_count"]
        rows.append(("Tokens", f"{tokens:,} in {steps:,} steps of {tokens // max(steps, 1):,}"))
    if data := _describe_data(settings):
        rows.append(("Data", data))
    if isinstance(optimizer, dict) and optimizer.get("class_path"):
        rate = (optimizer.get("init_args") or {}).get("lr")
        name = str(optimizer["class_path"]).rpartition(".")[2]
        rows.append(("Optimizer", name + (f", learning rate {rate:g}" if isinstance(rate, float) else "")))
    if train.get("lr_warmup_steps"):
        rows.append(("Warm-up", f"{train['lr_warmup_steps']:,} steps"))
    balance = (settings.get("moe") or {}).items()
    if numbers := [f"{key} {value:g}" for key, value in balance if type(value) in (int, float) and value]:
        rows.append(("Balance", ", ".join(numbers)))
    return rows + [(key.capitalize(), str(settings[key])) for key in ("precision", "seed") if key in settings]


def tokens_seen(state: dict[str, Any], settings: dict[str, Any], block_size: int) -> int | None:
    """Return the tokens trained on over all devices; None where that is not recorded."""
    train = settings.get("train") or {}
    steps, batch = state.get("step_count"), train.get("global_batch_size")
    if not isinstance(steps, int) or not isinstance(batch, int):
        return None
    return steps * batch * (train.get("max_seq_length") or block_size)


def _describe_data(settings: dict[str, Any]) -> str | None:
    """Return what is known of the training text: its folder by name, without the path to it."""
    given = ((settings.get("data") or {}).get("init_args") or {}).get("train_data_path")
    if not isinstance(given, str):
        return None
    folder = Path(given).parent
    try:
        split = read_json(folder / MANIFEST)["splits"]["train"]
        files = [Path(entry["path"]).name for entry in split["text"]]
        counts = f"{split['n_stories']:,} texts, {split['n_tokens']:,} tokens"
    except (OSError, ValueError, KeyError, TypeError):  # the data have moved: the name is what is left
        return f"`{folder.name}`"
    return f"`{folder.name}` ({', '.join(files[:3])}{' ...' if len(files) > 3 else ''}): {counts}"
