"""Show which tokens each expert takes, and how specialised the experts are, as a table, JSON and a picture.

Run: uv run python tools/inspect_routing.py checkpoints/final stories.txt      (25 s, most of it imports)

litgpt_moe/routing.py defines the figures.
"""

import warnings
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from litgpt_moe import cli, threads
from litgpt_moe.cli import run_script
from litgpt_moe.files import check_replaceable, open_whole, read_json, write_json
from litgpt_moe.flags import FlagParser, add_flags, from_flags

JSON_NAME, PNG_NAME = "routing.json", "routing.png"


@dataclass(frozen=True)
class InspectSettings:
    """How much is read, what is shown, and where the files are written."""

    out: Path = Path("routing")
    """Folder for routing.json and routing.png."""
    layer: int | None = None
    """Layer whose experts are listed (default: the most specialised)."""
    max_tokens: int = 20_000
    """Tokens of the text to read."""
    overwrite: bool = False
    """Replace the files of an earlier run."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1, ..."""
    precision: str = "auto"
    """auto (bf16-true where CUDA has it, else 32-true), 32-true, bf16-true, 16-true."""


def check(settings: InspectSettings, text: Path) -> None:
    """Raise ValueError or OSError for mistakes that can be found before the slow imports."""
    from litgpt_moe.data.text import check_text_file

    if settings.max_tokens < 2:
        raise ValueError(f"max_tokens is {settings.max_tokens}; choose 2 or more")
    if find_spec("matplotlib") is None:
        raise ValueError("the package matplotlib is not installed; run uv sync --extra report")
    check_text_file(text)
    if settings.out.exists() and not settings.out.is_dir():
        raise FileExistsError(f"{settings.out} is a file; name a folder")
    for path in (settings.out / JSON_NAME, settings.out / PNG_NAME):
        if path.exists() and not settings.overwrite:
            raise FileExistsError(f"{path} exists; add --overwrite or name another --out")
        check_replaceable(path, ".png", is_own=lambda path: {"overlap", "layers"} <= read_json(path).keys())


def run(settings: InspectSettings, checkpoint: Path, text: Path) -> str:
    """Write both files; return the lines to print. Raises ValueError or OSError with one sentence."""
    from litgpt_moe.checkpoints.layout import find_checkpoint
    from litgpt_moe.checkpoints.reader import load_model, load_tokenizer, processor_of, verify_checkpoint
    from litgpt_moe.hardware import pick_device
    from litgpt_moe.routing import inspect, table
    from litgpt_moe.routing_figure import draw
    from litgpt_moe.scoring import text_corpus

    device, dtype = pick_device(settings.device, settings.precision)
    folder = find_checkpoint(checkpoint)
    verify_checkpoint(folder)
    processor, corpus = processor_of(load_tokenizer(folder)), text_corpus([text], folder)
    model = load_model(folder, device, dtype)
    ids = corpus.read(0, min(settings.max_tokens, corpus.n_tokens))
    try:
        layers, shown, overlap = inspect(model, ids, processor.id_to_token, settings.layer)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    content: dict[str, Any] = {
        "checkpoint": str(folder),
        "text": cli.printable(str(text)),
        "n_tokens": len(ids),
    }
    content |= {name: getattr(model.config, name) for name in ("n_expert", "n_expert_per_token")}
    content |= {"overlap": overlap, "layers": [asdict(layer) for layer in layers]}
    title = cli.printable(f"{model.config.name}: how {len(ids):,} tokens of {text.name} are routed")
    figure = draw(title, layers, overlap, shown)
    write_json(settings.out / JSON_NAME, content)
    with open_whole(settings.out / PNG_NAME) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about characters that the font lacks
        figure.savefig(file, format="png", facecolor="white")
    wrote = f"Wrote {settings.out / JSON_NAME} (all layers) and {settings.out / PNG_NAME}"
    hint = "Next: look at the picture; --layer N --overwrite lists the experts of another layer"
    return f"{table(layers, shown)}\n\n{wrote}\n{hint}"


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work, 2 for bad input, 130 after Ctrl-C."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add("--ckpt_dir", type=Path, help="checkpoint directory, or an out_dir (its final or newest)")
    parser.accept_positional("ckpt_dir", is_required=True)
    add("text", type=Path, help="UTF-8 text, stories separated by a line <|endoftext|>")
    add_flags(parser, InspectSettings)
    args = parser.parse_args(argv)
    settings: InspectSettings = from_flags(InspectSettings, args)
    try:
        check(settings, args.text)
    except (ValueError, OSError) as error:
        return cli.fail(*cli.explain(error))
    threads.limit_spinning()
    # imports torch, which takes seconds: before run_command, Ctrl-C ends the process without a traceback
    import litgpt_moe.routing_figure  # noqa: F401

    with threads.sleep_when_busy():
        return cli.run_command(lambda: run(settings, args.ckpt_dir, args.text))


if __name__ == "__main__":
    raise SystemExit(run_script(main))
