"""The files of a tokenizer, with truncation and padding off, and their digests.

Nothing heavy is imported here: worker processes import this module.
"""

import contextlib
import hashlib
import json
import re
from pathlib import Path

from litgpt_moe.checkpoints.layout import TOKENIZER_FILES, read_files

# Not by litgpt.utils.copy_config_files: it also copies model_config.yaml and config.json, and a tokenizer
# folder may hold those of another model. LitGPT can read tokenizer.model too.
COPIED_FILES = (*TOKENIZER_FILES, "tokenizer.model")
CUTS_OR_PADS = re.compile(rb'"(truncation|padding)"\s*:\s*(?!null)\S')


def without_truncation(content: bytes) -> bytes:
    """Return the content of a tokenizer.json with truncation and padding off; unchanged if they are."""
    if CUTS_OR_PADS.search(content):  # it may also match an entry of the vocabulary
        with contextlib.suppress(ValueError, RecursionError, AttributeError):  # a damaged file stays as it is
            spec = json.loads(content)
            if spec.get("truncation") or spec.get("padding"):
                return json.dumps(spec | {"truncation": None, "padding": None}).encode()
    return content


def tokenizer_sha256(content: bytes) -> str:
    """Return the digest of a tokenizer.json, in which truncation and padding do not count."""
    return hashlib.sha256(without_truncation(content)).hexdigest()


def is_tokenizer(content: bytes, sha256: str) -> bool:
    """Return whether a tokenizer.json has the recorded digest; earlier versions recorded the file's own."""
    return sha256 in (tokenizer_sha256(content), hashlib.sha256(content).hexdigest())


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a tokenizer by name, as a checkpoint is to hold them."""
    files = read_files(folder, COPIED_FILES)
    if content := files.get("tokenizer.json"):
        files["tokenizer.json"] = without_truncation(content)
    if content := files.get("tokenizer_config.json"):
        with contextlib.suppress(ValueError, RecursionError):
            config = json.loads(content)
            if isinstance(config, dict) and not isinstance(config.get("tokenizer_class"), str):
                # GPT-2's has none, and LitGPT needs one
                config["tokenizer_class"] = "PreTrainedTokenizerFast"
                files["tokenizer_config.json"] = json.dumps(config).encode()
    return files
