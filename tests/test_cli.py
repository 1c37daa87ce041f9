"""What every script shares: help at once, nothing done at import, one-way imports, and YAML that loads."""

import ast
import itertools
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from litgpt_moe.cli import FlagParser, add_flags, command_line

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")])
SCRIPTS = [path for path in FILES if "__main__" in path.read_text(encoding="utf-8")]
WITH_FLAGS = [path for path in SCRIPTS if "FlagParser(" in path.read_text(encoding="utf-8")]
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
MODEL_CONFIGS = [
    path
    for path in [ROOT / "model_config.yaml", *CONFIGS]
    if "\nn_layer:" in path.read_text(encoding="utf-8")
]

# each of these alone takes longer to import than --help may take
HEAVY = ("torch", "litgpt", "lightning", "wandb", "transformers", "tensorboard", "bitsandbytes")

# DESIGN.md's table; wandb_dataset owns FlagParser and is light, so whoever has flags may import it
OURS = {path.stem for path in ROOT.glob("*.py")}
MAY_IMPORT = {
    "moe_layers": set(),
    "wandb_dataset": set(),
    "prepare_data": {"wandb_dataset"},
    "run_train": {"moe_layers", "prepare_data", "wandb_dataset"},
    "evaluate": {"moe_layers", "prepare_data", "wandb_dataset"},
    "generate": {"moe_layers", "prepare_data", "wandb_dataset"},
}

RUN_AND_LIST_MODULES = """
import runpy, sys
from pathlib import Path
script, heavy = sys.argv[1], sys.argv[3:]
sys.argv = [script, sys.argv[2]]
sys.path[0] = str(Path(script).parent)
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    loaded = [name for name in heavy if name in sys.modules]
    print("imported:", *loaded, file=sys.stderr)
    sys.exit(end.code)
"""


def relative(path: Path) -> str:
    """A file's name in a test's id."""
    return path.relative_to(ROOT).as_posix()


def run_python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new Python, as a user would run a script: from the root, with no terminal."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "PYTHONUTF8": "1", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=relative)
def test_help_exits_0_without_importing_anything_heavy(script: Path) -> None:
    result = run_python(RUN_AND_LIST_MODULES, script, "--help", *HEAVY)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
    assert result.stderr.splitlines()[-1].split() == ["imported:"]


@pytest.mark.parametrize("flag", ["--config=none.yaml", "--model_config=none.yaml"])
def test_a_wrong_name_of_a_config_is_told_before_torch_is_imported(flag: str) -> None:
    result = run_python(RUN_AND_LIST_MODULES, ROOT / "run_train.py", flag, *HEAVY)
    assert result.returncode == 2
    *_, error, imported = result.stderr.splitlines()
    assert error.startswith("error: none.yaml: no such configuration file; ")
    assert imported.split() == ["imported:"]


@pytest.mark.skipif(os.name == "nt", reason="Windows does not tell the time that a child worked")
@pytest.mark.parametrize("script", SCRIPTS, ids=relative)
def test_help_answers_within_a_second_of_work(script: Path) -> None:
    seconds = []
    while len(seconds) < 3 and (not seconds or min(seconds) >= 1):  # the time of this process, not of others
        before = os.times()
        subprocess.run([sys.executable, script, "--help"], stdout=subprocess.DEVNULL, check=True)
        after = os.times()
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
    assert min(seconds) < 1


@pytest.mark.parametrize("script", SCRIPTS, ids=relative)
def test_importing_a_script_prints_and_parses_nothing(script: Path) -> None:
    # a script that parsed at import would end with status 2 over this flag
    module = ".".join(script.relative_to(ROOT).with_suffix("").parts)
    code = (
        f"import sys; sys.path[0] = {str(ROOT)!r}; sys.argv = ['script', '--no_such_flag']; import {module}"
    )
    result = run_python(code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("script", SCRIPTS, ids=relative)
def test_a_script_has_the_house_main_and_says_how_to_run_it(script: Path) -> None:
    tree = ast.parse(script.read_text(encoding="utf-8"))
    (main,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert ast.unparse(main.args) == "argv: list[str] | None=None"
    assert ast.unparse(main.returns) == "int"
    assert ast.unparse(tree.body[-1]) in (
        "if __name__ == '__main__':\n    raise SystemExit(run_script(main))",
        "if __name__ == '__main__':\n    raise SystemExit(main())",  # what imports nothing of ours
    )
    assert f"uv run python {relative(script)}" in (ast.get_docstring(tree) or "")


@pytest.mark.parametrize("script", WITH_FLAGS, ids=relative)
def test_an_unknown_flag_is_told_in_one_sentence_without_the_usage(script: Path) -> None:
    result = run_python(RUN_AND_LIST_MODULES, script, "--hlep")
    assert result.returncode == 2 and result.stdout == ""
    line, imported = result.stderr.splitlines()
    assert line.startswith("error: ") and "--hlep" in line and imported == "imported:"


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
        (["text", "more"], "nothing is to be done with more; see --help"),
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


def test_a_value_that_begins_with_dashes_is_no_flag_after_two_dashes() -> None:
    parser = FlagParser()
    parser.add_argument("file")
    assert parser.parse_args(["--", "--odd"]).file == "--odd"


def imported_modules(path: Path) -> set[str]:
    """The first part of every module that the file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_one_way(path: Path) -> None:
    tools = {tool.stem for tool in ROOT.glob("tools/*.py")} | {"tools"}
    # a tool may import anything, so also what several of them share; nothing else imports tools/
    allowed = OURS | tools if path.parent.name == "tools" else MAY_IMPORT[path.stem]
    assert imported_modules(path) & (OURS | tools) <= allowed


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
    from moe_layers import MoEConfig

    assert MoEConfig.from_file(path).n_expert > 0


@pytest.mark.parametrize("path", MODEL_CONFIGS, ids=relative)
def test_a_model_configuration_has_the_size_its_name_tells(path: Path) -> None:
    from moe_layers import MoEConfig
    from tools.count_params import count_params

    count = count_params(MoEConfig.from_file(path))
    assert count.named_params is None or abs(count.deviation) <= 0.05


@pytest.mark.parametrize("path", MODEL_CONFIGS, ids=relative)
def test_the_header_of_a_model_configuration_tells_its_true_counts(path: Path) -> None:
    from moe_layers import MoEConfig
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


def test_a_command_to_paste_has_its_paths_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command_line("--out_dir", Path("my runs"), "--step", 3) == (
        '--out_dir "my runs" --step 3' if sys.platform == "win32" else "--out_dir 'my runs' --step 3"
    )
    monkeypatch.setattr(sys, "platform", "win32")  # cmd and PowerShell know no single quotes
    assert command_line("--out_dir", Path("my runs")) == '--out_dir "my runs"'
