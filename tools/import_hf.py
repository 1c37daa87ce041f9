"""Turn a model of Hugging Face Transformers into a checkpoint that LitGPT and our scripts train on from.

Run: uv run python tools/import_hf.py TinyLlama/TinyLlama-1.1B-Chat-v1.0 checkpoints/tinyllama
(a folder's name instead stays on this machine; 20 s for a small one, most of it imports)

Mixtral, Qwen3-MoE, Llama and Qwen3 are read, from safetensors, where LitGPT computes exactly the same;
other classes and variants are refused. A repository comes from the hub (HF_ENDPOINT chooses a mirror).
Nothing in it is run.
"""

import argparse
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt_moe.cli import FlagParser, command_line

if TYPE_CHECKING:
    from tools.hf_format import Weights

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FILE_NAME = re.compile(r"[\w.-]{1,200}\.safetensors")  # an index may not point out of its folder
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


# --- from the hub -------------------------------------------------------------------------------------------


def fetch(repository: str, folder: Path) -> None:
    """Bring the files of a hub repository that are needed into `folder`; what is there already stays.

    Raises:
        ConnectionError: the hub, or a file in it, cannot be reached.
    """
    from tqdm import tqdm

    from prepare_data import download

    way_out = "check the name and HF_ENDPOINT, or give a folder"

    def bring(name: str, is_needed: bool) -> bool:
        try:
            if not (folder / name).is_file():
                folder.mkdir(parents=True, exist_ok=True)
                download(repository, "model", name, folder, way_out)
        except ConnectionError as error:
            if is_needed or not _is_missing(error.__cause__):
                raise
            return False
        return True

    bring("config.json", True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        bring(name, False)
    if not bring(SINGLE, False):
        bring(INDEX, True)
        for name in tqdm(shard_names(folder), unit="file", disable=None):
            bring(name, True)


def _is_missing(error: BaseException | None) -> bool:
    from huggingface_hub.errors import EntryNotFoundError

    return isinstance(error, EntryNotFoundError)


# --- from a folder ------------------------------------------------------------------------------------------


def shard_names(folder: Path) -> list[str]:
    """Return the names of the files that hold the weights. ValueError or OSError if there are none."""
    from tools.hf_format import read_json

    if (folder / SINGLE).is_file():
        return [SINGLE]
    if not (folder / INDEX).is_file():
        others = [path.name for pattern in ("*.bin", "*.pth", "*.gguf") for path in folder.glob(pattern)]
        found = f"; {others[0]} is of another format" if others else ""
        raise FileNotFoundError(f"{folder} holds neither {SINGLE} nor {INDEX}{found}")
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{folder / INDEX} has no weight_map; get it again")
    if odd := [name for name in names.values() if not isinstance(name, str) or not FILE_NAME.fullmatch(name)]:
        raise ValueError(f"{folder / INDEX} names {odd[0]!r:.80}, which is no file of its folder")
    return sorted(set(names.values()))


def read_weights(folder: Path) -> "Weights":
    """Return all weights in a folder. ValueError, in one sentence, if a file is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from tqdm import tqdm

    weights = {}
    for name in tqdm(shard_names(folder), unit="file", desc="reading", disable=None):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing, {INDEX} names it; get the whole folder again"
            )
        try:
            weights |= load_file(folder / name)
        except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:100]
            raise ValueError(f"{folder / name} is damaged or no safetensors file ({reason})") from None
    kinds = {str(weight.dtype).removeprefix("torch.") for weight in weights.values()}
    if odd := sorted(kinds - {"float32", "bfloat16", "float16"}):
        raise ValueError(
            f"{folder}: the weights are in {odd[0]}; float32, bfloat16 or float16 can be trained on"
        )
    return weights


def tokenizer_files(folder: Path) -> tuple[dict[str, bytes], int]:
    """Return the tokenizer's files as LitGPT reads them, and the number of its pieces.

    LitGPT puts BOS before a text if `add_bos_token` says so, else takes one away; where the key is missing it
    guesses by the names of class and folder. So it is given here, as tokenizer.json does it.
    """
    from tokenizers import Tokenizer

    from tools.folders import TOKENIZER_FILES, read_files
    from tools.hf_format import read_json, to_json

    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no tokenizer.json; AutoTokenizer's save_pretrained writes one"
        )
    files = read_files(folder, TOKENIZER_FILES)
    settings, ids = (
        read_json(folder / name) if name in files else {}
        for name in ("tokenizer_config.json", "generation_config.json")
    )
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{folder / 'tokenizer.json'} is not readable ({str(error)[:100]})") from None
    given = read_json(folder / "config.json")
    for kind in ("bos", "eos"):
        token = settings.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        number = tokenizer.token_to_id(token) if isinstance(token, str) else None
        if number is None:
            several = ids.get(f"{kind}_token_id", given.get(f"{kind}_token_id"))
            number = several[0] if isinstance(several, list) and several else several
            settings.pop(f"{kind}_token", None)
            settings |= {f"{kind}_token": name} if (name := _piece(tokenizer, number)) else {}
        ids[f"{kind}_token_id"] = number
    if "add_bos_token" not in settings:
        settings["add_bos_token"] = tokenizer.encode("a").ids[:1] == [ids["bos_token_id"]]
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    files["tokenizer_config.json"] = to_json(settings).encode()
    files["generation_config.json"] = to_json(ids).encode()
    return files, tokenizer.get_vocab_size()


def _piece(tokenizer: Any, number: Any) -> str | None:
    return tokenizer.id_to_token(number) if isinstance(number, int) and number >= 0 else None


def import_folder(folder: Path, name: str, out: Path) -> tuple[str, bool]:
    """Write the checkpoint; return a line that says what it is, and whether it has experts.

    Raises:
        ValueError: something is missing or damaged, or LitGPT would compute something else.
        WorkFailed: the disk is full.
    """
    from moe_layers import count_parameters
    from tools.folders import write_checkpoint
    from tools.hf_format import read_json, to_lit_config, to_lit_weights

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; name a folder that Transformers saved")
    files, n_pieces = tokenizer_files(folder)
    told = read_json(folder / "config.json").get("_name_or_path")
    name = Path(told).name if isinstance(told, str) and told.strip("./\\ ") else name
    # LitGPT takes another norm for these names
    config = to_lit_config(folder / "config.json", re.sub("(?i)gemma|olmo", "model", name), n_pieces)
    weights = to_lit_weights(config, read_weights(folder))
    write_checkpoint(out, weights, config, files)
    total, active = count_parameters(config)
    kind = str(weights["lm_head.weight"].dtype).removeprefix("torch.")
    some = f", {active:,} active per token" if config.n_expert else ""
    return f"Wrote {out}: {config.name}, {total:,} parameters{some}, in {kind}", config.n_expert > 0


def run(args: argparse.Namespace) -> list[str]:
    """Do what the flags say and return what to print. Raises as `fetch` and `import_folder`."""
    from litgpt_moe.files import check_new_folder
    from tools.folders import NEXT, train_on

    folder = Path(args.source)
    fetched = args.out.absolute().with_name(f".{args.out.absolute().name}.download")
    check_new_folder(args.out, 0)
    if not folder.is_dir():
        if not REPOSITORY.fullmatch(args.source):
            raise FileNotFoundError(f"{args.source}: no such folder, and no OWNER/NAME of the hub either")
        fetch(args.source, folder := fetched)
    line, is_moe = import_folder(folder, Path(args.source).absolute().name, args.out)
    shutil.rmtree(fetched, ignore_errors=True)
    model = command_line("--ckpt_dir", args.out)
    upcycle = command_line(args.out, f"{args.out}_moe", "--n_expert", 8, "--n_expert_per_token", 2)
    return [
        line,
        f'{NEXT}\n  uv run python generate.py {model} --prompt "Once upon a time"',
        *([] if is_moe else [f"  uv run python tools/upcycle.py {upcycle}"]),
        f"  {train_on(args.out)}",
    ]


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work, 2 for bad input, 130 after Ctrl-C."""
    parser = FlagParser(description=__doc__)
    parser.add_argument("source", help="a folder that Transformers saved, or OWNER/NAME on the hub")
    parser.add_argument("out", type=Path, help="checkpoint directory to make; must not exist, or be empty")
    args = parser.parse_args(argv)
    from litgpt_moe.cli import run_command

    return run_command(lambda: "\n".join(run(args)))


if __name__ == "__main__":
    raise SystemExit(main())
