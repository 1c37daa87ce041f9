"""What every script shares: help at once, nothing done at import, errors in a sentence, YAML that loads."""

import ast
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, start_scripts

from litgpt_moe.cli import WorkFailed, command_line, explain, no_bar, note, run_command
from litgpt_moe.flags import FlagParser, add_flags
from litgpt_moe.processes import note_once

FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("tools/**/*.py")])
SCRIPTS = [path for path in FILES if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")]
# run_train.py types its keys by jsonargparse, beside the classes that they name
WITH_FLAGS = [
    path
    for path in SCRIPTS
    if "FlagParser(" in path.read_text(encoding="utf-8") and path.name != "run_train.py"
]
RUN_TRAIN = ROOT / "run_train.py"
WRONG_FILES = ["--config=none.yaml", "--model_config=none.yaml"]
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
MODEL_CONFIGS = [
    path
    for path in [ROOT / "model_config.yaml", *CONFIGS]
    if "\nn_layer:" in path.read_text(encoding="utf-8")
]


def relative(path: Path) -> str:
    """A file's name in a test's id."""
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="session")
def started() -> Callable[..., dict]:
    """A function that returns what a script did with one flag, or when it was imported."""
    jobs = [[script, *flags] for script in SCRIPTS for flags in ([], ["--help"], ["--hlep"])]
    results = start_scripts([*jobs, *([RUN_TRAIN, flag] for flag in WRONG_FILES)])
    return lambda script, *flags: results[json.dumps([str(script), *flags])]


@pytest.mark.parametrize("script", SCRIPTS, ids=relative)
def test_help_answers_at_once_for_it_imports_nothing_heavy(
    script: Path, started: Callable[..., dict]
) -> None:
    result = started(script, "--help")
    assert result["heavy"] == [] and (result["status"], result["err"]) == (0, "")
    assert "usage:" in result["out"]


def test_a_heavy_import_is_found(tmp_path: Path) -> None:
    script = tmp_path / "heavy.py"
    script.write_text("import yaml\nimport torch\n", encoding="utf-8")
    (result,) = start_scripts([[script, "--help"]]).values()
    assert result["heavy"] == ["torch"]


@pytest.mark.parametrize("flag", WRONG_FILES)
def test_a_wrong_name_of_a_config_is_told_before_torch_is_imported(
    flag: str, started: Callable[..., dict]
) -> None:
    result = started(RUN_TRAIN, flag)
    assert result["status"] == 2 and result["heavy"] == []
    assert result["err"].splitlines()[-1].startswith("error: none.yaml: no such configuration file; ")


@pytest.mark.parametrize("script", SCRIPTS, ids=relative)
def test_importing_a_script_prints_and_parses_nothing(script: Path, started: Callable[..., dict]) -> None:
    # a script that parsed at import would end with status 2 over the flag of that process
    assert started(script) == {"status": None, "out": "", "err": "", "heavy": []}


@pytest.mark.parametrize("script", SCRIPTS, ids=relative)
def test_a_script_has_the_house_main_and_says_how_to_run_it(script: Path) -> None:
    tree = ast.parse(script.read_text(encoding="utf-8"))
    (main,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert ast.unparse(main.args) == "argv: list[str] | None=None"
    assert ast.unparse(main.returns) == "int"
    assert ast.unparse(tree.body[-1]).replace("cli.", "") in (
        "if __name__ == '__main__':\n    raise SystemExit(run_script(main))",
        "if __name__ == '__main__':\n    raise SystemExit(cli.run_script(main))",
        "if __name__ == '__main__':\n    raise SystemExit(main())",  # what imports nothing of ours
    )
    assert f"uv run python {relative(script)}" in (ast.get_docstring(tree) or "")


@pytest.mark.parametrize("script", WITH_FLAGS, ids=relative)
def test_an_unknown_flag_is_told_in_one_sentence_without_the_usage(
    script: Path, started: Callable[..., dict]
) -> None:
    result = started(script, "--hlep")
    assert (result["status"], result["out"], result["heavy"]) == (2, "", [])
    (line,) = result["err"].splitlines()
    assert line.startswith("error: ") and "--hlep" in line


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--batch-sise", "4", "text"], "--batch_sise is no flag; did you mean --batch_size?"),
        (["--batch_sise=4", "text"], "--batch_sise is no flag; did you mean --batch_size?"),
        (["--nothing_like_it", "text"], "--nothing_like_it is no flag; see --help for the flags"),
        (["--batch_size", "many", "text"], "--batch_size is 'many'; it must be a whole number"),
        (["--share", "", "text"], "--share is ''; it must be a number"),
        (["--split", "test", "text"], "--split is 'test'; choose one of train, val"),
        (["--folder", "", "text"], "--folder: the path is ''; name one, '.' is the current folder"),
        (["text", "--batch_size"], "--batch_size needs a value; see --help"),
        ([], "missing: file; see --help"),
        (["text", "more"], "unexpected argument: more; see --help"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_sentence(
    flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = FlagParser(description="tried")
    parser.add_argument("file")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--share", type=float)
    parser.add_argument("--split", choices=("train", "val"))
    parser.add_argument("--folder", type=Path)
    for parse in (parser.parse_args, parser.parse_intermixed_args):
        with pytest.raises(SystemExit) as end:
            parse(flags)
        assert (end.value.code, capsys.readouterr()) == (2, ("", f"error: {sentence}\n"))


@pytest.mark.parametrize(
    "flags", ["--bar a b", "--bar true a b", "a --bar=true b", "a b --bar", "--no_bar=false a b"]
)
def test_a_switch_leaves_the_word_after_it_to_others(flags: str) -> None:
    @dataclass(frozen=True)
    class Settings:
        bar: bool = False

    parser = FlagParser()
    parser.add_argument("first")
    parser.add_argument("second")
    add_flags(parser, Settings)
    args = parser.parse_args(flags.split())
    assert (args.first, args.second, args.bar) == ("a", "b", True)


def test_a_default_of_nought_or_one_is_told_in_the_help() -> None:
    @dataclass(frozen=True)
    class Settings:
        port: int = 0
        """Any free one."""
        count: float = 1.0
        """How many."""

    parser = FlagParser()
    add_flags(parser, Settings)
    text = parser.format_help()
    assert "Any free one (default 0)" in text and "How many (default 1.0)" in text


def test_a_flag_of_an_inherited_field_has_its_text_too() -> None:
    @dataclass(frozen=True)
    class Place:
        port: int = 0
        """Any free one."""

    @dataclass(frozen=True)
    class Settings(Place):
        count: float = 1.0
        """How many."""

    parser = FlagParser()
    add_flags(parser, Settings)
    text = parser.format_help()
    assert "Any free one (default 0)" in text and "How many (default 1.0)" in text


def test_a_value_that_begins_with_dashes_is_no_flag_after_two_dashes() -> None:
    parser = FlagParser()
    parser.add_argument("file")
    assert parser.parse_args(["--", "--odd"]).file == "--odd"


def header_of(path: Path) -> str:
    """The comment that a configuration opens with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_a_config_opens_with_its_command(path: Path) -> None:
    assert "uv run python" in header_of(path)


@pytest.mark.parametrize("path", CONFIGS, ids=relative)
def test_every_yaml_in_configs_loads(path: Path) -> None:
    assert yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", MODEL_CONFIGS, ids=relative)
def test_every_model_configuration_passes_its_checks(path: Path) -> None:
    from litgpt_moe.config import MoEConfig

    assert (MoEConfig.from_file(path).n_expert == 0) is path.stem.endswith("_dense")


@pytest.mark.parametrize("path", MODEL_CONFIGS, ids=relative)
def test_a_model_configuration_has_the_size_its_name_tells(path: Path) -> None:
    from litgpt_moe.config import MoEConfig
    from tools.count_params import count_params

    count = count_params(MoEConfig.from_file(path))
    assert count.named_params is None or abs(count.deviation) <= 0.05


@pytest.mark.parametrize("path", MODEL_CONFIGS, ids=relative)
def test_the_header_of_a_model_configuration_tells_its_true_counts(path: Path) -> None:
    from litgpt_moe.config import MoEConfig
    from tools.count_params import count_params

    count = count_params(MoEConfig.from_file(path))
    assert f"{count.total_params / 1e6:.1f}M parameters" in header_of(path)
    assert f"{count.active_params / 1e6:.1f}M of them active" in header_of(path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
@pytest.mark.parametrize(
    ("script", "module"),
    [
        ("run_train.py", "torch"),
        ("prepare_data.py", "tokenizers"),
        ("evaluate.py", "torch"),
        ("generate.py", "torch"),
    ],
)
def test_ctrl_c_while_a_script_imports_ends_it_without_a_traceback(
    script: str, module: str, tmp_path: Path
) -> None:
    # -v names each module that is imported, and waits for its reader before the last of them
    process = subprocess.Popen(
        [sys.executable, "-v", str(ROOT / script)],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    lines = iter(process.stderr)
    assert any(f"import '{module}." in line for line in lines)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == -signal.SIGINT
    assert "Traceback" not in rest


def test_a_command_to_paste_has_its_paths_quoted() -> None:
    assert command_line("--out_dir", Path("my runs"), "--step", 3) == (
        '--out_dir "my runs" --step 3' if sys.platform == "win32" else "--out_dir 'my runs' --step 3"
    )


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        (Path("my runs"), '"my runs"'),
        ("C:\\runs\\a-1", "C:\\runs\\a-1"),
        ("\\\\server\\share\\été", "\\\\server\\share\\été"),
        ("D:\\my runs\\", '"D:\\my runs\\\\"'),  # else the last backslash would escape the quotation mark
        ("R&D", '"R&D"'),  # cmd and PowerShell would start a second command
        ("a;b", '"a;b"'),
        ("(1)", '"(1)"'),
        ("it's", '"it\'s"'),
        ("0.9,0.95", '"0.9,0.95"'),  # a list in PowerShell
        ("@runs", '"@runs"'),
        ("", '""'),
        ('say "no"', '"say \\"no\\""'),
        ("$HOME", "'$HOME'"),  # PowerShell replaces it inside double quotes
        ("\\\\server\\c$\\runs", '"\\\\server\\c$\\runs"'),  # but not this
        ("--train.max_tokens", "--train.max_tokens"),
        ("--out_dir=a", "--out_dir=a"),
    ],
)
def test_a_command_to_paste_on_windows_is_quoted_for_cmd_and_powershell(
    word: object, quoted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert command_line("--out_dir", word, 3) == f"--out_dir {quoted} 3"


ESCAPES = "\x1b[2J\x1b]0;owned\x07\u202etxt"


def test_no_name_in_a_message_can_command_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fails() -> None:
        raise ValueError(f"{ESCAPES}: damaged")

    assert run_command(lambda: ESCAPES) == 0 and run_command(fails) == 2
    note(ESCAPES)
    note_once(ESCAPES)
    with pytest.raises(SystemExit):
        FlagParser().parse_args([ESCAPES])
    captured = capsys.readouterr()
    assert captured.err.count(r"\x1b[2J\x1b]0;owned\x07\u202etxt") == 4
    assert captured.out == r"\x1b[2J\x1b]0;owned\x07\u202etxt" + "\n"
    assert not {"\x1b", "\x07", "\u202e"} & set(captured.err)


@pytest.mark.parametrize(
    ("error", "text", "status"),
    [
        (OSError(errno.EIO, "Input/output error", "a"), "a: Input/output error; try again", 1),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a"), "a could not be written, the disk is full; ", 1),
        (OSError(errno.EACCES, "Permission denied", "a"), "a: Permission denied; check the path and ", 2),
        (OSError(errno.ENOSPC, "a needs 3 bytes; make room"), "a needs 3 bytes; make room", 1),
        (WorkFailed("it broke"), "it broke", 1),
    ],
)
def test_an_error_of_the_system_is_a_sentence_and_work_that_failed_has_status_1(
    error: Exception, text: str, status: int
) -> None:
    told, found = explain(error)
    assert told.startswith(text) and found == status


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell closes the streams")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_error_and_its_number_is_given_to_no_file(closed: str, tmp_path: Path) -> None:
    code = (
        "import sys; from litgpt_moe.cli import run_script\n"
        "def main():\n"
        "    with open('file', 'wb') as file:\n"
        "        print('out'); print('err', file=sys.stderr)\n"
        "        return 0 if file.fileno() > 2 else 9\n"
        "sys.exit(run_script(main))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = f'"{sys.executable}" -c "$CODE" {closed}'
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=env | {"CODE": code}, capture_output=True, check=False
    )
    assert done.returncode == 0 and (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize(
    ("backend", "is_kept"), [("module://matplotlib_inline.backend_inline", False), ("agg", True)]
)
def test_the_matplotlib_backend_of_a_notebook_is_not_passed_on(backend: str, is_kept: bool) -> None:
    code = "import os, sys; from litgpt_moe.cli import run_script\nsys.exit(run_script(lambda: {}))"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": backend}
    done = subprocess.run([sys.executable, "-c", code.format("'MPLBACKEND' in os.environ")], env=env)
    assert done.returncode == is_kept


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("work", ["run_command(lambda: 'a')", "run_command(lambda: say('a'))", "help_of()"])
def test_a_full_disk_behind_stdout_is_told_as_such(work: str) -> None:
    code = (
        "import sys; from litgpt_moe.cli import *; from litgpt_moe.flags import *\n"
        "help_of = lambda: FlagParser().parse_args(['--help'])\n"
        f"sys.exit(run_script(lambda: {work}))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    told = "error: standard output could not be written (No space left on device); make room, or "
    assert done.returncode == 1 and done.stderr.startswith(told) and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "script", [path for path in SCRIPTS if path.parent.name != "benchmarks"], ids=relative
)
def test_a_script_prints_its_results_by_say(script: Path) -> None:
    # say names standard output when it cannot be written; the two others run before the packages are there
    tree = ast.parse(script.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    prints = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    to_stdout = [call for call in prints if not any(word.arg == "file" for word in call.keywords)]
    assert len(to_stdout) == (script.name in ("lock.py", "env_sanity_check.py"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(("work", "status"), [("note('a') or say('b') or 0", 0), ("fail('a', 2)", 2)])
def test_a_full_disk_behind_stderr_ends_no_work(work: str, status: int) -> None:
    code = f"import sys; from litgpt_moe.cli import *; sys.exit(run_script(lambda: {work}))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=env, stderr=full, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == status and done.stdout == ("" if status else "b\n")


# --- what all commands have in common -----------------------------------------------------------------------


@dataclass(frozen=True)
class Few:
    """Flags of a command."""

    ckpt_dir: Path = Path("checkpoints")
    """A checkpoint."""
    max_tokens: int = 200
    """New tokens."""
    rare: bool = False
    """Seldom needed."""


def a_parser() -> FlagParser:
    parser = FlagParser(("ckpt_dir", "max_tokens"), prog="tried")
    add_flags(parser, Few)
    parser.accept_positional("ckpt_dir")
    return parser


@pytest.mark.parametrize(
    "flags", ["--ckpt_dir a", "--ckpt-dir=a", "a", "a --max_tokens 3", "--max_tokens 3 a", "--rare a"]
)
def test_a_checkpoint_is_named_with_its_flag_or_without(flags: str) -> None:
    assert a_parser().parse_args(flags.split()).ckpt_dir == Path("a")
    assert a_parser().parse_args([]).ckpt_dir == Path("checkpoints")


def test_two_checkpoints_or_none_where_one_is_needed_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = FlagParser()
    parser.add_argument("--ckpt_dir", type=Path)
    parser.accept_positional("ckpt_dir", is_required=True)
    for flags in (["--ckpt_dir", "a", "b"], []):
        with pytest.raises(SystemExit):
            parser.parse_args(flags)
    twice, missing = capsys.readouterr().err.splitlines()
    assert twice == "error: --ckpt_dir is a and b is given too; drop one"
    assert missing == "error: missing: --ckpt_dir; see --help"


def test_a_checkpoint_before_a_flag_and_a_folder_after_it_keep_their_places() -> None:
    parser = FlagParser()
    parser.add_argument("--ckpt_dir", type=Path)
    parser.accept_positional("ckpt_dir", is_required=True)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype")
    for words in ("a --dtype x b", "--dtype x a b", "--ckpt_dir a --dtype x b", "b --ckpt_dir a --dtype x"):
        args = parser.parse_args(words.split())
        assert (args.ckpt_dir, args.out) == (Path("a"), Path("b")), words


def test_help_shows_the_common_flags_and_help_all_every_one(capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for flag in ("--help", "--help_all", "--help-all"):
        with pytest.raises(SystemExit) as end:
            a_parser().parse_args([flag])
        assert end.value.code == 0
        shown.append(capsys.readouterr().out)
    short, long, again = shown
    assert "--ckpt_dir" in short and "--help_all" in short and "rare" not in short
    assert "--[no_]rare" in long and long == again


def test_quiet_leaves_out_notes_and_bars_but_no_warning(capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in ((["--quiet"], "Warning: b\n"), ([], "a\nWarning: b\n")):
        a_parser().parse_args(words)
        note("a")
        note("Warning: b")
        assert capsys.readouterr().err == told and no_bar() is (True if words else None)


def test_a_short_number_and_a_name_that_is_nearly_right(capsys: pytest.CaptureFixture[str]) -> None:
    parser = FlagParser()
    parser.add_argument("--split", choices=("train", "val"))
    parser.add_argument("--max_tokens", type=int)
    assert parser.parse_args(["--max_tokens", "1.5k"]).max_tokens == 1500
    with pytest.raises(SystemExit):
        parser.parse_args(["--split", "tranin"])
    told = "error: --split is 'tranin'; did you mean train? Choose one of train, val\n"
    assert capsys.readouterr().err == told
