"""Continue a text with a trained checkpoint, word by word as the model finds them.

Run: uv run python generate.py --prompt "Once upon a time"
(10 s to import and load, then about 60 tokens/s with MoE-200M on one CPU core)

Standard output carries the text alone: prompt and continuation; with --num_samples above 1 a line
`<|endoftext|>` stands between the texts, as prepare_data.py reads them. Everything else goes to stderr.

`generate.py --serve` opens a playground at http://127.0.0.1:8000 (one page, nothing is loaded from elsewhere)
and OpenAI's /v1/completions for the clients that speak it; a request that leaves a parameter out gets the
flag's value. The same seed and prompt give the same text here and there.
"""

import errno
import os
import select
import stat
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from litgpt_moe.cli import (
    FlagParser,
    WorkFailed,
    add_flags,
    explain,
    fail,
    from_flags,
    note,
    run_command,
    run_script,
    silence_stdout,
)
from litgpt_moe.generation.settings import DEFAULT_PROMPT, GenerateSettings, Sampling

if TYPE_CHECKING:
    from litgpt_moe.generation.text import AsyncTokenStreamer

SEPARATOR = "<|endoftext|>"
SERVE_PACKAGES = ("pydantic", "starlette", "uvicorn")


def read_settings(argv: list[str] | None) -> tuple[GenerateSettings, Sampling]:
    """Return what the flags say. ValueError names every value that is out of range; an unknown flag exits."""
    parser = FlagParser(
        description="Continue a text with a trained checkpoint.",
        usage="%(prog)s [--prompt TEXT | --prompt_file FILE] [--serve] [options]",
        epilog="stdout carries prompt and continuation, a line <|endoftext|> between samples.",
    )
    kinds = (GenerateSettings, Sampling)
    for kind in kinds:
        add_flags(parser, kind)
    args, made, problems = parser.parse_args(argv), [], []
    for kind in kinds:
        try:
            made.append(from_flags(kind, args))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return tuple(made)


# --- the prompt ---------------------------------------------------------------------------------------------


def read_prompt(settings: GenerateSettings) -> str:
    """Return the text to continue: --prompt, --prompt_file, standard input, or the default."""
    prompt, file = settings.prompt, settings.prompt_file
    if file is not None:
        try:
            return _utf8(file.read_bytes(), str(file))
        except OSError as error:
            reason = f"--prompt_file is {file}: {error.strerror}"
            raise ValueError(f"{reason}; name a UTF-8 text file that can be read") from None
    if prompt == "-" or (prompt is None and not settings.serve and _is_piped_in()):
        text = _utf8(sys.stdin.buffer.read(), "standard input")
        return text or (DEFAULT_PROMPT if prompt is None else "")
    return DEFAULT_PROMPT if prompt is None else _utf8(os.fsencode(prompt), "--prompt")


def _utf8(data: bytes, place: str) -> str:
    try:  # a file's last line break is the editor's, not the author's
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 at byte {error.start:,}; save it as UTF-8") from None


def _is_piped_in() -> bool:
    """Return whether standard input is a file, or a pipe with content (an idle one would block for ever)."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # no standard input, or a closed or replaced one
        return False
    if stat.S_ISFIFO(mode) and os.name == "posix":  # Windows cannot wait on a pipe; --prompt - reads it
        return bool(select.select([sys.stdin], [], [], 0.5)[0])
    return stat.S_ISREG(mode)


# --- the text -----------------------------------------------------------------------------------------------


def write_samples(settings: GenerateSettings, sampling: Sampling, prompt: str) -> None:
    """Write the samples that the flags ask for, one after the other, each from the next seed."""
    import torch

    from litgpt_moe.generation.decode import generate
    from litgpt_moe.generation.text import AsyncTokenStreamer, encode_prompt, load

    model, tokenizer = load(settings)
    prompt_ids = encode_prompt(model, tokenizer, prompt, settings.max_tokens)
    generator = torch.Generator(model.lm_head.weight.device)
    seed = generator.seed() % 2**32 if settings.seed is None else settings.seed
    for number in range(settings.num_samples):
        if number:
            print(SEPARATOR, flush=True)
        # a seed each, so that --seed repeats any one of them alone, and a server makes them side by side
        generator.manual_seed(seed + number)
        if sampling.temperature > 0:
            note(f"seed {seed + number}")
        new_ids = generate(model, prompt_ids, settings.max_tokens, sampling, tokenizer.eos_id, generator)
        count = write_sample(AsyncTokenStreamer(tokenizer.processor), prompt_ids, new_ids)
        if count < settings.max_tokens and len(prompt_ids) + count == model.max_seq_length:
            note(f"stopped: the context of {model.max_seq_length:,} tokens is full")


def write_sample(streamer: "AsyncTokenStreamer", prompt_ids: list[int], new_ids: Iterator[int]) -> int:
    """Write prompt and continuation as they come, and the speed to stderr; return how many tokens are new."""
    started, first_s, count = time.perf_counter(), 0.0, 0
    try:
        with streamer:
            for token_id in prompt_ids:
                streamer.put(token_id)
            for token_id in new_ids:
                count += 1
                first_s = first_s or time.perf_counter() - started
                streamer.put(token_id)
        print(flush=True)
    except OSError as error:
        silence_stdout()
        # `| head` closes the pipe when it has seen enough; Windows says EINVAL for that
        if error.errno in (errno.EPIPE, errno.EINVAL):
            raise BrokenPipeError from None
        text = f"the text could not be written ({error}); free space or write elsewhere"
        raise WorkFailed(text) from None
    finally:  # after Ctrl-C, too
        seconds = time.perf_counter() - started
        rate = f"{count / seconds:.1f} tokens/s, the first after {first_s:.2f} s"
        note(f"{count} new tokens in {seconds:.1f} s, {rate}")
    return count


# --- the command --------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work, 2 for bad settings or input, 130 after Ctrl-C."""
    try:
        settings, sampling = read_settings(argv)
        prompt = read_prompt(settings)
        missing = [package for package in SERVE_PACKAGES if settings.serve and find_spec(package) is None]
        if missing:
            raise ValueError(f"--serve needs {missing[0]}; install it with: uv sync --extra serve")
    except ValueError as error:
        return fail(*explain(error))
    # torch and the rest are imported here, where Ctrl-C ends the process without a traceback
    if settings.serve:
        from litgpt_moe.serving.app import serve as act
    else:
        import litgpt_moe.generation.text  # noqa: F401

        act = write_samples
    return run_command(lambda: act(settings, sampling, prompt))


if __name__ == "__main__":
    raise SystemExit(run_script(main))
