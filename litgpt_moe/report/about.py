"""The words of a report on what a run was: model, machine, data, passes, code, evaluation.

They come from logs/run.json, which may be old or another program's: what it lacks is left out.
"""

from typing import Any

from litgpt_moe.files import fits
from litgpt_moe.words import short

MAX_WORDS = 400
# the forms that `files.fits` checks
MODEL = {"name": str, "total_params": 0, "active_params": 0, "n_layer": 0, "n_embd": 0}
EXPERTS = {"n_expert": 1, "n_expert_per_token": 1}
MACHINE = {"system": str, "cpu": str, "cores": 1, "memory": 0, "device": str, "devices": 1, "machines": 1}
GPU = {"gpu": str, "gpu_memory": 0}
COUNTS = {"n_tokens": 1, "n_stories": 0}
DATA = {"folder": str, "vocab_size": 0, "train": COUNTS, "val": {**COUNTS, "n_tokens": 0}}
COMMIT = {"id": str, "is_changed": bool}


def about(
    facts: dict[str, Any], settings: dict[str, str], tokens: float | None, results: list[dict[str, Any]]
) -> dict[str, str]:
    """Return label -> words, for the labels of which something is known.

    `tokens` is what the run has been trained on so far, `results` are its rows of evaluate.py.
    """
    words = {
        "Model": _model(facts.get("model")) or settings.get("model.name"),
        "Parameters": _parameters(facts.get("model")),
        "Machine": _machine(facts.get("machine")),
        "Data": _data(facts.get("data")),
        "Passes": _passes(facts.get("data"), tokens),
        "Commit": _commit(facts.get("commit")),
        "Evaluation": _evaluation(results),
    }
    return {label: text[:MAX_WORDS] for label, text in words.items() if text}


def _model(facts: Any) -> str | None:
    if not fits(facts, MODEL):
        return None
    shape = f"{facts['name']}: {facts['n_layer']} layers of width {facts['n_embd']}"
    if not fits(facts, EXPERTS):
        return f"{shape}, no experts"
    return f"{shape}, {facts['n_expert']} experts, {facts['n_expert_per_token']} for each token"


def _parameters(facts: Any) -> str | None:
    if not fits(facts, MODEL):
        return None
    total, active = facts["total_params"], facts["active_params"]
    return f"{short(total)}, {short(active) if active < total else 'all'} active for each token"


def _machine(facts: Any) -> str | None:
    if not fits(facts, MACHINE):
        return None
    cpu = f"{facts['cpu']} ({facts['cores']} cores, {facts['memory'] / 1e9:.0f} GB)"
    parts = [cpu, facts["system"]]
    if facts["device"] == "cuda" and fits(facts, GPU):
        several = f"{facts['devices']} x " if facts["devices"] > 1 else ""
        # a card's GB are GiB
        parts.insert(0, f"{several}{facts['gpu']} ({facts['gpu_memory'] / 2**30:.0f} GB)")
    elif facts["device"] != "cpu":
        parts.insert(0, facts["device"])
    return ("" if facts["machines"] == 1 else f"{facts['machines']} machines: ") + ", ".join(parts)


def _data(facts: Any) -> str | None:
    if not fits(facts, DATA):
        name = facts.get("class_path") if isinstance(facts, dict) else None
        return name if isinstance(name, str) else None
    train, val = facts["train"], facts["val"]
    counts = f"{short(train['n_tokens'])} tokens in {train['n_stories']:,} stories"
    pieces = f"a tokenizer of {facts['vocab_size']:,} pieces"
    return f"{facts['folder']}: {counts}, {short(val['n_tokens'])} tokens to validate, {pieces}"


def _passes(facts: Any, tokens: float | None) -> str | None:
    if tokens is None or not fits(facts, DATA):
        return None
    return f"{short(tokens / facts['train']['n_tokens'])} through the training data"


def _commit(facts: Any) -> str | None:
    if not fits(facts, COMMIT):
        return None
    return f"{facts['id'][:12]}{', with changes that are not committed' if facts['is_changed'] else ''}"


def _evaluation(rows: list[dict[str, Any]]) -> str | None:
    """Return the newest row that has a loss."""
    if (row := next((row for row in reversed(rows) if row.get("loss") is not None), None)) is None:
        return None
    figures = {
        "loss": "loss {:.4f}",
        "perplexity": "perplexity {:.4g}",
        "bits_per_byte": "{:.4f} bits per byte",
    }
    known = [form.format(row[name]) for name, form in figures.items() if row.get(name) is not None]
    return f"{row['checkpoint']} on {row['data']}: {', '.join(known)}"
