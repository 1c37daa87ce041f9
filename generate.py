"""Continue a text with a trained checkpoint, printing each word as soon as it is generated.

Run: uv run python generate.py --prompt "Once upon a time"
(some seconds to import and load; what a CPU then makes is in docs/results.md)

Standard output carries only the text: prompt and continuation; with --num_samples above 1 the texts are
separated by a line `<|endoftext|>`, which prepare_data.py understands. Everything else goes to stderr.

`generate.py --serve` opens a playground at http://127.0.0.1:8000 (one page, nothing is loaded from elsewhere)
and OpenAI's /v1/completions and /v1/chat/completions; the flags are the defaults of a request's parameters.
The same seed and prompt give the same text in both modes.
"""

import os
import select
import stat
import sys
from importlib.util import find_spec

from litgpt_moe import threads
from litgpt_moe.cli import fail, run_command, run_script, status
from litgpt_moe.flags import FlagParser, add_flags, from_flags
from litgpt_moe.generation.settings import DEFAULT_PROMPT, GenerateSettings, Sampling

MAX_PROMPT_BYTES = 1 << 24  # far beyond any context
COMMON = ("prompt", "ckpt_dir", "max_tokens", "num_samples", "seed", "temperature", "top_p", "serve", "port")
SERVE_PACKAGES = ("pydantic", "starlette", "uvicorn")


def read_settings(argv: list[str] | None) -> tuple[GenerateSettings, Sampling]:
    """Return the settings in the flags. ValueError names every value that is out of range."""
    parser = FlagParser(
        COMMON,
        description="Continue a text with a trained checkpoint.",
        usage="%(prog)s [CKPT_DIR] [--prompt TEXT | --prompt_file FILE] [--serve] [options]",
        epilog="stdout carries prompt and continuation, a line <|endoftext|> between samples.",
    )
    kinds = (GenerateSettings, Sampling)
    for kind in kinds:
        add_flags(parser, kind)
    parser.accept_positional("ckpt_dir")
    args, made, problems = parser.parse_args(argv), [], []
    for kind in kinds:
        try:
            made.append(from_flags(kind, args))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return tuple(made)


def read_prompt(settings: GenerateSettings) -> str:
    """Return the text to continue: --prompt, --prompt_file, standard input, or the default."""
    prompt, file = settings.prompt, settings.prompt_file
    if file is not None:
        try:
            with file.open("rb") as opened:
                return _utf8(opened.read(MAX_PROMPT_BYTES + 1), str(file))
        except OSError as error:
            reason = f"--prompt_file is {file}: {error.strerror}"
            raise ValueError(f"{reason}; name a UTF-8 text file that can be read") from None
    if prompt == "-" or (prompt is None and not settings.serve and _is_piped_in()):
        text = _utf8(sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1), "standard input")
        return text if text or prompt else DEFAULT_PROMPT
    return DEFAULT_PROMPT if prompt is None else _utf8(os.fsencode(prompt), "--prompt")


def _utf8(data: bytes, place: str) -> str:
    if len(data) > MAX_PROMPT_BYTES:  # also a device, which never ends
        raise ValueError(f"{place} has over {MAX_PROMPT_BYTES:,} bytes; shorten the prompt")
    try:
        # editors add the last line break; it is not part of the prompt
        return data.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 at byte {error.start:,}; save it as UTF-8") from None


def _is_piped_in() -> bool:
    """Return whether standard input is a file, or a pipe with content (reading an idle one would block)."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # standard input is missing, closed or replaced
        return False
    if stat.S_ISFIFO(mode) and os.name == "posix":  # Windows cannot wait on a pipe; --prompt - reads it
        return bool(select.select([sys.stdin], [], [], 0.5)[0])
    return stat.S_ISREG(mode)


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work, 2 for bad settings or input, 130 after Ctrl-C."""
    try:
        settings, sampling = read_settings(argv)
        prompt = read_prompt(settings)
        for package in SERVE_PACKAGES if settings.serve else ():
            if find_spec(package) is None:
                raise ValueError(f"--serve needs {package}; install it with: uv sync --extra serve")
    except ValueError as error:
        return fail(error, 2)
    threads.limit_spinning()
    # torch is imported here, where Ctrl-C ends the process without a traceback
    with status("loading PyTorch and LitGPT"):
        if settings.serve:
            from litgpt_moe.serving.app import serve as act
        else:
            from litgpt_moe.generation.text import write_samples as act
    with threads.sleep_when_busy():
        return run_command(lambda: act(settings, sampling, prompt))


if __name__ == "__main__":
    raise SystemExit(run_script(main))
