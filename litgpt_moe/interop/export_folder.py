"""A checkpoint becomes a folder that Transformers loads, compared with LitGPT before it gets its name."""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from litgpt.tokenizer import Tokenizer
from safetensors.torch import save_file

from litgpt_moe.checkpoints.layout import CONFIG_FILE
from litgpt_moe.checkpoints.reader import load_model
from litgpt_moe.checkpoints.writer import tensor_bytes
from litgpt_moe.cli import WorkFailed
from litgpt_moe.config import MoEConfig
from litgpt_moe.files import new_folder, sync_files, write_json
from litgpt_moe.interop import tokenizer_files, transformers
from litgpt_moe.interop.families import family_of
from litgpt_moe.interop.model_card import PROMPT, model_card

WEIGHTS_FILE = "model.safetensors"
TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order differ by about 1e-6
N_CHECKED = 64  # tokens whose logits are compared
TEXTS = (
    f"{PROMPT}, there was a cat.",
    '"No!" she said.\n\nThen  two spaces.',
    "caf\u00e9 \U0001f431 42",
)


def check_packages(with_gguf: bool, is_checked: bool) -> None:
    """Raise ValueError if a package that the flags need is not installed."""
    for name, is_needed in (("transformers", is_checked), ("gguf", with_gguf)):
        if is_needed and find_spec(name) is None:
            other = ", or add --no_check" if name == "transformers" else ""
            raise ValueError(f"the package {name} is not installed; run uv sync --extra export{other}")


def write_folder(folder: Path, out: Path, dtype: str | None, with_gguf: bool, is_checked: bool) -> list[str]:
    """Write the checkpoint in `folder` to `out`, or nothing; return lines that say what was written."""
    config = MoEConfig.from_file(folder / CONFIG_FILE)
    family = family_of(config)
    gguf = import_module("litgpt_moe.interop.gguf") if with_gguf else None  # needs an optional package
    if gguf:
        gguf.check_gguf(config, folder)
    model = load_model(folder)
    weights = {k: w.to(getattr(torch, dtype)) if dtype else w for k, w in model.state_dict().items()}
    kind = next(iter(weights.values())).dtype
    name = str(kind).removeprefix("torch.")
    files, ids = tokenizer_files.to_hf_tokenizer(folder, config.block_size)
    files["config.json"] = transformers.to_hf_config(config, transformers.is_tied(weights), name, ids)
    renamed = transformers.to_hf_weights(config, weights)
    gguf_name = re.sub(r"[^\w.-]", "-", f"{config.name or 'model'}-{name}.gguf") if gguf else None
    card = model_card(folder, config, family.architecture, gguf_name, name)
    size = tensor_bytes(renamed)
    lines = [f"Wrote   {out}: {family.architecture} in {name}, {size:,} bytes of weights"]
    with new_folder(out, size * (2 if gguf else 1)) as staging:
        for file, content in files.items():
            write_json(staging / file, content)
        (staging / "README.md").write_text(card, encoding="utf-8")
        save_file({k: w.contiguous() for k, w in renamed.items()}, staging / WEIGHTS_FILE, {"format": "pt"})
        # safetensors 0.8 writes a file that others may not read
        (staging / WEIGHTS_FILE).chmod((staging / "README.md").stat().st_mode)
        if gguf and gguf_name:
            gguf.write_gguf(staging / gguf_name, config, renamed, staging)
            lines.append(f"GGUF    {out / gguf_name}")
        if is_checked:
            lines.append(check_folder(staging, folder, kind))
        sync_files(staging)
    return lines


def check_folder(out: Path, folder: Path, dtype: torch.dtype) -> str:
    """Return a line that says how near Transformers comes to LitGPT; WorkFailed if it is not near.

    Both compute in float32, with the weights rounded to `dtype`.
    """
    import transformers  # not everybody installs it, and it takes seconds

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    theirs, ours = transformers.AutoTokenizer.from_pretrained(out, local_files_only=True), Tokenizer(folder)
    for text in TEXTS:
        if theirs(text).input_ids != ours.encode(text).tolist():
            raise WorkFailed(
                f"{folder}: AutoTokenizer gives other ids than LitGPT for {text!r}; nothing was written"
            )
    model = load_model(folder, dtype=dtype).float()
    load = transformers.AutoModelForCausalLM.from_pretrained
    copy = load(out, dtype=torch.float32, local_files_only=True).eval()
    n_tokens = min(N_CHECKED, model.max_seq_length)
    tokens = torch.randint(model.config.vocab_size, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, got = model(tokens), copy(tokens).logits
    worst, scale = (expected - got).abs().max().item(), expected.abs().max().item()
    if not worst <= TOLERANCE * max(scale, 1.0):
        differ = f"{folder}: Transformers' logits differ by {worst:.2g} from LitGPT's (largest {scale:.2g})"
        raise WorkFailed(f"{differ}; nothing was written. --no_check writes it nevertheless")
    version = f"Transformers {transformers.__version__}"
    return f"Checked {version} gives the same token ids, and logits within {worst:.1e} (largest {scale:.1f})"
