"""Score a checkpoint on a whole split or on text files: loss, perplexity, bits per byte, load per expert.

Run: uv run python evaluate.py --ckpt_dir checkpoints      (20 s after the demo run on two CPU cores)

With --blimp also on minimal pairs of sentences, with --stories also by stories that it writes. Each result is
appended to results.jsonl in the current folder, with the path and digest of the checkpoint; tools/report.py
shows the results of a run. litgpt_moe/scoring.py and litgpt_moe/quality/ define the figures.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from litgpt_moe import cli, threads
from litgpt_moe.cli import WorkFailed, note, run_script
from litgpt_moe.flags import FlagParser, add_flags, from_flags
from litgpt_moe.quality.settings import QualitySettings

CHECKPOINTS = Path("checkpoints")
COMMON = ("ckpt_dir", "data_dir", "split", "text", "max_batches", "json", "blimp", "stories")


@dataclass(frozen=True)
class EvaluateSettings:
    """Which model is scored on which text."""

    ckpt_dir: Path | None = None
    """Checkpoint directory, or an out_dir: then its final/ or newest step-*/ (default checkpoints)."""
    random_weights: bool = False
    """Score an untrained model of --model_config, as a baseline."""
    model_config: Path = Path("model_config.yaml")
    """Model settings for random weights."""
    tokenizer_dir: Path | None = None
    """Tokenizer for random weights (default: the one that made the data)."""
    data_dir: Path | None = None
    """Prepared data (default: those that the checkpoint was trained on, else data/custom_text)."""
    split: Literal["train", "val"] = "val"
    """Part of the data to score."""
    text: list[Path] | None = None
    """Score this text file instead, of a form that prepare_data.py reads; repeatable."""
    text_column: str | None = None
    """Column of the text in --text's rows (default: text, else the only one with strings)."""
    loss: bool = True
    """Score text; --no_loss leaves that out, for --blimp or --stories alone."""
    max_seq_length: int | None = None
    """Tokens per window (default: the model's block_size)."""
    batch_size: int = 8
    """Windows per forward pass."""
    max_batches: int | None = None
    """Stop after this many batches (default: score all)."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1, ..."""
    precision: str = "auto"
    """auto (bf16-true where CUDA has it, else 32-true), 32-true, bf16-true, 16-true."""
    quantize: Literal["none", "int8"] = "none"
    """int8 = round the weights as generate.py does with this flag, to measure what it costs."""
    seed: int = 42
    """Seed of the random weights, and of the first story."""
    json: bool = False
    """Print JSON, with the load of every expert."""
    results_file: str = "results.jsonl"
    """Append the JSON here, none = nowhere, beside = results.jsonl beside the checkpoint's folder."""

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("max_seq_length", "batch_size", "max_batches")}
        bad = [f"--{name} is {n}; choose 1 or more" for name, n in counts.items() if n is not None and n < 1]
        bad += [] if 0 <= self.seed < 2**63 else [f"--seed is {self.seed}; choose 0 or more, below 2**63"]
        if self.text_column and not self.text:
            bad.append("--text_column says where the rows of --text have it; give --text too")
        if self.random_weights and self.ckpt_dir:
            bad.append("--random_weights leaves no use for --ckpt_dir; give one of the two")
        if bad:
            raise ValueError("\n".join(bad))


def evaluate(settings: EvaluateSettings, quality: QualitySettings) -> dict[str, Any]:
    """Return the figures and the facts to record about model, text and settings."""
    from litgpt_moe import scoring
    from litgpt_moe.checkpoints.reader import load_model
    from litgpt_moe.generation.quantization import round_weights
    from litgpt_moe.hardware import keep_freed_memory, pick_device
    from litgpt_moe.quality.assess import Subject, assess, read_inputs

    inputs = read_inputs(quality)
    device, dtype = pick_device(settings.device, settings.precision)
    folder = None if settings.random_weights else scoring.pick_checkpoint(settings.ckpt_dir, CHECKPOINTS)
    if folder is None:
        note("Warning: Evaluating random weights!")
    is_split, data_dir = settings.loss and not settings.text, None
    if is_split or quality.stories:
        data_dir = settings.data_dir or scoring.data_of(folder)
    tokenizer_dir = scoring.pick_tokenizer(folder or settings.tokenizer_dir, data_dir if is_split else None)
    corpus = None
    if is_split and data_dir:
        corpus = scoring.split_corpus(data_dir, settings.split, tokenizer_dir)
    elif settings.loss:
        corpus = scoring.text_corpus(settings.text or [], tokenizer_dir, settings.text_column)
    if folder:
        model = load_model(folder, device, dtype)
    else:
        model = scoring.random_model(settings.model_config, settings.seed, device, dtype)
    window = scoring.pick_window(settings.max_seq_length, corpus, model) if corpus else None
    counts = {"batch_size": settings.batch_size, "max_batches": settings.max_batches}
    place = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    identity = {
        "checkpoint": scoring.describe_checkpoint(folder) if folder else None,
        "random_weights": folder is None,
        "model_name": model.config.name,
        "data": corpus.identity if corpus else {},
        "settings": {"max_seq_length": window, **counts, **place},
    }
    if settings.quantize == "int8":
        round_weights(model)
        identity["settings"]["quantize"] = "int8"
    if device.type == "cpu":
        keep_freed_memory()  # the next chunk of logits reuses it
    scores = scoring.score(model, corpus, window, **counts) if corpus and window else scoring.NO_FIGURES
    others = assess(Subject(model, identity, tokenizer_dir, data_dir, settings.seed), quality, inputs, scores)
    return {**scores, **others, **identity, "time": datetime.now(UTC).isoformat(timespec="seconds")}


def report(result: dict[str, Any]) -> str:
    """Return the result as readable lines."""
    from litgpt_moe.quality.assess import lines_of

    checkpoint = result["checkpoint"]
    model = f"{shorter(checkpoint['path'])}, step {checkpoint['step']}" if checkpoint else "random weights"
    lines = [] if result["loss"] is None else loss_lines(result)
    return "\n".join([f"model         {result['model_name']} ({model})", *lines, *lines_of(result)])


def loss_lines(result: dict[str, Any]) -> list[str]:
    """Return the lines on text that was scored."""
    data, stderr = result["data"], result["loss_stderr"]
    text = ", ".join(file["path"] for file in data["text"]) if "text" in data else None
    lines = [
        f"text          {text or data['data_dir'] + ' ' + data['split']}: {result['n_tokens']:,} tokens "
        f"predicted, {result['n_bytes']:,} bytes",
        f"loss          {result['loss']:.4f}{'' if stderr is None else f' +- {stderr:.4f}'} nats per token",
        f"perplexity    {result['perplexity']:.4g}",
        f"bits per byte {result['bits_per_byte']:.4f}",
        f"speed         {result['tokens_per_s']:,.0f} tokens/s, {result['seconds']:.1f} s",
    ]
    if loads := result["expert_load"]:
        even = 1 / len(next(iter(loads.values())))
        lines += [f"expert load   share of a layer's tokens; even is {even:.1%}"]
        lines += ["  layer  max/mean  least used        most used"]
        lines += [load_row(layer, tokens) for layer, tokens in loads.items()]
    return lines


def shorter(path: str) -> str:
    """Return a path relative to the current folder if it is inside."""
    return str(Path(path).relative_to(Path.cwd()) if Path(path).is_relative_to(Path.cwd()) else path)


def load_row(layer: int, tokens_E: list[int]) -> str:
    """Return one layer's line of the expert load table."""
    share_E = [tokens / sum(tokens_E) for tokens in tokens_E]
    least, most = (f"{end(share_E):6.1%} (expert {share_E.index(end(share_E))})" for end in (min, max))
    return f"  {layer:>5}  {max(share_E) * len(share_E):8.2f}  {least:<16}  {most}"


def run(settings: EvaluateSettings, quality: QualitySettings) -> None:
    """Score the model, print the result and append it to the results file."""
    from litgpt_moe.report.results import check_file

    if settings.results_file not in ("none", "beside"):
        check_file(Path(settings.results_file))
    result = evaluate(settings, quality)
    try:
        cli.say(json.dumps(result, indent=2) if settings.json else cli.printable(report(result)))
    except OSError as error:
        if not cli.is_closed_pipe(error):
            raise
        cli.silence_stdout()  # `| head` closes the pipe
    finally:  # also after a full disk behind stdout
        record(result, settings.results_file)
    if failure := result.get("failure") or ((result.get("stories") or {}).get("judge") or {}).get("failure"):
        raise WorkFailed(failure)  # after the rest, which took long, is recorded


def record(result: dict[str, Any], results_file: str) -> None:
    """Append the result to the results file."""
    from litgpt_moe.report.results import RESULTS_FILE, append

    path, checkpoint = Path(results_file), result["checkpoint"]
    if results_file == "beside":
        path = (Path(checkpoint["path"]).parent if checkpoint else CHECKPOINTS) / RESULTS_FILE
    if results_file != "none":
        append(result, path)


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work, 2 for bad settings or input, 130 after Ctrl-C."""
    parser = FlagParser(COMMON, description=__doc__)
    for kind in (EvaluateSettings, QualitySettings):
        add_flags(parser, kind)
    parser.accept_positional("ckpt_dir")
    args = parser.parse_args(argv)
    try:
        settings, quality = (from_flags(kind, args) for kind in (EvaluateSettings, QualitySettings))
        if not settings.loss and quality.blimp is None and quality.stories is None:
            raise ValueError("--no_loss leaves nothing to score; add --blimp PATH or --stories N")
    except ValueError as error:
        return cli.fail(error, 2)
    threads.limit_spinning()
    # imports torch, which takes seconds: before run_command, Ctrl-C ends the process without a traceback
    with cli.status("loading PyTorch and LitGPT"):
        import litgpt_moe.scoring  # noqa: F401

    interrupted = "interrupted, nothing is recorded; --max_batches N scores less"
    with threads.sleep_when_busy():
        return cli.run_command(lambda: run(settings, quality), interrupted)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
