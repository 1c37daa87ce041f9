"""Convert a tokenizer's files between Transformers and LitGPT, so that a text has the same ids in both."""

import json
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing

from litgpt_moe.checkpoints.layout import TOKENIZER_FILES, read_files
from litgpt_moe.checkpoints.reader import load_tokenizer, processor_of
from litgpt_moe.checkpoints.tokenizer_files import without_truncation
from litgpt_moe.data.tokenizer import as_value_error, load_for_encoding
from litgpt_moe.files import read_json


def to_hf_tokenizer(folder: Path, block_size: int) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return the content of the tokenizer's files, and its `bos_token_id` and `eos_token_id`.

    LitGPT prepends BOS if tokenizer_config.json says so; Transformers if the post-processor of tokenizer.json
    does. `PreTrainedTokenizerFast` uses that file unchanged (`LlamaTokenizer` would build another pipeline).
    """
    tokenizer = load_tokenizer(folder)
    processor = processor_of(tokenizer)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    bos, eos = (None if i is None else processor.id_to_token(i) for i in ids.values())
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    whole |= {"post_processor": None, "truncation": None, "padding": None}
    if tokenizer.use_bos:
        single, pair = f"{bos}:0 $A:0", f"{bos}:0 $A:0 {bos}:1 $B:1"
        processor.post_processor = TemplateProcessing(single, pair, [(bos, tokenizer.bos_id)])
        whole["post_processor"] = json.loads(processor.to_str())["post_processor"]
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bool(tokenizer.use_bos)}
    settings |= {"add_eos_token": False, "clean_up_tokenization_spaces": False}
    settings |= {"model_max_length": block_size, "bos_token": bos, "eos_token": eos}
    if unk := whole["model"].get("unk_token"):
        settings["unk_token"] = unk
    return dict(zip(TOKENIZER_FILES, (whole, settings, ids), strict=True)), ids


def to_lit_tokenizer(folder: Path) -> tuple[dict[str, bytes], int]:
    """Return the tokenizer's files as LitGPT reads them, and the number of its pieces.

    LitGPT prepends BOS if `add_bos_token` is true and removes one if it is false. Without the key it guesses
    by the names of class and folder, so the key is always written.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        way_out = "AutoTokenizer's save_pretrained writes one"
        raise FileNotFoundError(f"{folder} holds no tokenizer.json; {way_out}")
    files = read_files(folder, TOKENIZER_FILES)
    tokenizer = load_for_encoding(files["tokenizer.json"], path)
    files["tokenizer.json"] = without_truncation(files["tokenizer.json"])
    names = ("tokenizer_config.json", "generation_config.json", "config.json")
    settings, ids, model = (read_json(folder / name) for name in names)
    for kind in ("bos", "eos"):
        token, key = f"{kind}_token", f"{kind}_token_id"
        given = settings.get(token)
        piece = given.get("content") if isinstance(given, dict) else given
        number = tokenizer.token_to_id(piece) if isinstance(piece, str) else None
        if number is None:
            several = ids.get(key, model.get(key))
            number = several[0] if isinstance(several, list) and several else several
            settings.pop(token, None)
            if isinstance(number, int) and 0 <= number < 2**31 and (piece := tokenizer.id_to_token(number)):
                settings[token] = piece
        ids[key] = number
    if "add_bos_token" not in settings:
        with as_value_error(path, "it fails on the text 'a'", "get it again"):
            settings["add_bos_token"] = tokenizer.encode("a").ids[:1] == [ids["bos_token_id"]]
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    for name, content in (("tokenizer_config.json", settings), ("generation_config.json", ids)):
        files[name] = (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
    return files, tokenizer.get_vocab_size()
