"""The project's shape, read from the syntax tree: who may import whom, how long files and functions may be.

CONTRIBUTING.md shows the same table. Every rule is also tried on a small tree that breaks it, so that none
passes because it finds nothing.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("run_train", "prepare_data", "generate", "evaluate", "wandb_dataset")
# A module may import the rows above its own and, within the row, what stands to its left.
# The first row imports nothing of ours at all.
ROWS = (
    ("kernels", "balance", "files", "shell", "terminal", "threads", "words", "yaml_files"),
    ("moe_layers", "cli", "flags", "folders", "locks", "processes"),
    ("config", "loss", "recompute", "hardware"),
    ("checkpoints", "data", "generation", "planning", "budget"),
    (
        *("training", "serving", "scoring", "quality", "routing", "routing_figure", "interop", "report"),
        "comparison",
    ),
)
SCRIPT_LINES = {
    "run_train": 250,
    "prepare_data": 130,
    "generate": 250,
    "evaluate": 220,
    "wandb_dataset": 130,
    "moe_layers": 450,
}
LIBRARY_LINES, TOOL_LINES, BENCHMARK_LINES, FUNCTION_LINES, LINE_LENGTH = 300, 120, 300, 60, 110
LONG_TOOLS = ("tools/lock.py", "tools/env_sanity_check.py")  # they import nothing of ours, so share nothing


@dataclass(frozen=True)
class Import:
    """One import of a module: where it stands and what it names."""

    path: str
    line: int
    module: str
    is_inside_function: bool
    has_comment: bool


@dataclass(frozen=True)
class Tree:
    """The Python files of a project by their path from its root, with `/` on every system."""

    files: dict[str, str]

    @classmethod
    def of(cls, root: Path) -> "Tree":
        """Read the scripts, the library, the tools and the tests."""
        paths = [*root.glob("*.py")]
        for folder in ("litgpt_moe", "tools", "tests"):
            paths += root.glob(f"{folder}/**/*.py")
        return cls({p.relative_to(root).as_posix(): p.read_text(encoding="utf-8") for p in sorted(paths)})

    def imports(self, path: str) -> list[Import]:
        """Return every import of a file, at any depth, relative ones made absolute."""
        tree, lines = ast.parse(self.files[path]), self.files[path].splitlines()
        checks_types = {
            id(child)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for child in ast.walk(node)
        }
        found = []
        for node, is_inside in walk_with_functions(tree):
            if id(node) in checks_types or not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            around = lines[max(node.lineno - 2, 0) : node.end_lineno]
            has_comment = "#" in " ".join(around[1:]) or around[0].lstrip().startswith("#")
            for module in modules_of(node, path):
                found.append(Import(path, node.lineno, module, is_inside, has_comment))
        return found


def walk_with_functions(tree: ast.AST, is_inside: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Yield each node and whether it stands inside a function."""
    for node in ast.iter_child_nodes(tree):
        yield node, is_inside
        yield from walk_with_functions(
            node, is_inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        )


def modules_of(node: ast.Import | ast.ImportFrom, path: str) -> list[str]:
    """Return the full names of what an import names; `from a import b` may mean the module a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    package = path.split("/")[: -node.level] if node.level else []
    module = ".".join([*package, *([node.module] if node.module else [])])
    return [f"{module}.{alias.name}" for alias in node.names]


def part_of(module: str) -> str | None:
    """Return the part of the table that a module belongs to: a script, `tools`, or a part of the library."""
    first, *others = module.split(".")
    if first in (*SCRIPTS, "moe_layers", "tools"):
        return first
    return others[0] if first == "litgpt_moe" and others else None


def place_of(part: str) -> tuple[int, int] | None:
    """Return row and column of a part of the library in the table."""
    for row, parts in enumerate(ROWS):
        if part in parts:
            return row, parts.index(part)
    return None


def wrong_imports(tree: Tree) -> list[str]:
    """Return a sentence for each import that the table does not allow."""
    problems = []
    for path in tree.files:
        importer = part_of(path.removesuffix(".py").replace("/", "."))
        if path.startswith("tests/") or importer in (None, "tools", "__init__"):
            continue  # a tool may import anything
        if importer not in SCRIPTS and place_of(importer) is None:
            problems.append(f"{path}: {importer} has no row in the table of tests/test_structure.py")
            continue
        for found in tree.imports(path):
            imported = part_of(found.module)
            if imported is not None and not may_import(importer, imported):
                problems.append(f"{path}:{found.line}: {importer} may not import {imported}")
    return problems


def may_import(importer: str, imported: str) -> bool:
    """Return whether the table lets one part import another."""
    if imported == "__version__" or (imported == importer and importer not in SCRIPTS):
        return True
    if imported == "tools" or imported in SCRIPTS:
        return False  # nothing imports tools/, and no script is imported by another
    target = place_of(imported)
    if importer in SCRIPTS:
        return target is not None
    source = place_of(importer)
    if source is None or target is None:
        return False
    return target < source and source[0] > 0


def circles(tree: Tree) -> list[str]:
    """Return the modules that import one another in a circle, each circle as `a -> b -> a`.

    Counted are the imports at the top of modules: those are what Python cannot untangle.
    """
    names = {path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in tree.files}
    graph: dict[str, set[str]] = {}
    for path in tree.files:
        name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        wanted = [found.module for found in tree.imports(path) if not found.is_inside_function]
        targets = {module if module in names else module.rpartition(".")[0] for module in wanted}
        graph[name] = {target for target in targets if target in names and target != name}
    return [" -> ".join(circle) for circle in cycles(graph)]


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the circles that a depth-first search meets, none for an acyclic graph."""
    found, done = [], set()

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            found.append([*trail[trail.index(name) :], name])
        elif name not in done:
            for target in sorted(graph[name]):
                visit(target, [*trail, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def unexplained_imports(tree: Tree) -> list[str]:
    """Return the imports inside library functions without a comment (on or above the line) that says why."""
    return [
        f"{found.path}:{found.line}: {found.module} is imported inside a function; say why on its line"
        for path in tree.files
        if path.startswith("litgpt_moe/") or path == "moe_layers.py"
        for found in tree.imports(path)
        if found.is_inside_function and not found.has_comment
    ]


def imported_tests(tree: Tree) -> list[str]:
    """Return the tests that import another test: what they share belongs in tests/helpers."""
    return [
        f"{found.path}:{found.line}: imports the test {found.module}"
        for path in tree.files
        if path.startswith("tests/")
        for found in tree.imports(path)
        if any(part.startswith("test_") for part in found.module.split(".")[:-1])
        or found.module.startswith("test_")
    ]


def limit_of(path: str) -> int | None:
    """Return how many lines a file may have; None without a limit."""
    if path.startswith("litgpt_moe/"):
        return LIBRARY_LINES
    if path.startswith("tools/benchmarks/"):
        return BENCHMARK_LINES
    if path.startswith("tools/"):
        return None if path in LONG_TOOLS else TOOL_LINES
    return SCRIPT_LINES.get(path.removesuffix(".py"))


def long_files(tree: Tree) -> list[str]:
    """Return the files that are over their limit."""
    sizes = {path: len(text.splitlines()) for path, text in tree.files.items()}
    return [
        f"{path} has {size} lines, {limit_of(path)} are allowed"
        for path, size in sizes.items()
        if size > (limit_of(path) or size)
    ]


def long_functions(tree: Tree, limit: int = FUNCTION_LINES) -> list[str]:
    """Return the functions that are over the limit, decorators and docstring not counted."""
    problems = []
    for path, text in tree.files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                start = node.body[1].lineno if ast.get_docstring(node) and node.body[1:] else node.lineno
                size = (node.end_lineno or start) - start + 1
                if size > limit:
                    problems.append(f"{path}:{node.lineno}: {node.name} has {size} lines")
    return problems


def long_lines(tree: Tree) -> list[str]:
    """Return the lines that are too long."""
    return [
        f"{path}:{number}: {len(line)} characters"
        for path, text in tree.files.items()
        for number, line in enumerate(text.splitlines(), start=1)
        if len(line) > LINE_LENGTH
    ]


def unknown_scripts(tree: Tree) -> list[str]:
    """Return the Python files of the top level that DESIGN.md does not name."""
    return [path for path in tree.files if "/" not in path and path.removesuffix(".py") not in SCRIPT_LINES]


RULES = {
    "imports": wrong_imports,
    "circles": circles,
    "reasons": unexplained_imports,
    "tests": imported_tests,
    "files": long_files,
    "functions": long_functions,
    "lines": long_lines,
    "top level": unknown_scripts,
}
# for each rule a tree that breaks it, with what must be found, and the same tree without the fault
BROKEN = [
    ("imports", {"generate.py": "import evaluate"}, "generate.py:1: generate may not import evaluate"),
    (
        "imports",
        {"litgpt_moe/data/text.py": "def f():\n  import prepare_data"},
        "data may not import prepare_data",
    ),
    ("imports", {"litgpt_moe/loss.py": "from tools import report"}, "loss may not import tools"),
    ("imports", {"evaluate.py": "import tools.report"}, "evaluate may not import tools"),
    ("imports", {"litgpt_moe/files.py": "from litgpt_moe import cli"}, "files may not import cli"),
    ("imports", {"litgpt_moe/kernels/rows.py": "import moe_layers"}, "kernels may not import moe_layers"),
    (
        "imports",
        {"litgpt_moe/data/text.py": "from litgpt_moe import generation"},
        "data may not import generation",
    ),
    ("imports", {"litgpt_moe/training/run.py": "from .. import serving"}, "training may not import serving"),
    ("imports", {"litgpt_moe/loss.py": "from litgpt_moe.data.text import X"}, "loss may not import data"),
    ("imports", {"moe_layers.py": "from litgpt_moe.config import X"}, "moe_layers may not import config"),
    ("imports", {"litgpt_moe/wizard.py": ""}, "wizard has no row in the table"),
    (
        "circles",
        {"litgpt_moe/a.py": "import litgpt_moe.b", "litgpt_moe/b.py": "from litgpt_moe import a"},
        "a -> litgpt_moe.b",
    ),
    (
        "reasons",
        {"litgpt_moe/loss.py": "def f():\n    import torch\n"},
        "loss.py:2: torch is imported inside",
    ),
    ("tests", {"tests/data/test_a.py": "from test_b import make"}, "imports the test test_b.make"),
    (
        "tests",
        {"tests/data/test_a.py": "from tests.test_b import make"},
        "imports the test tests.test_b.make",
    ),
    ("files", {"litgpt_moe/loss.py": "\n" * 301}, "litgpt_moe/loss.py has 301 lines, 300 are allowed"),
    ("files", {"prepare_data.py": "\n" * 131}, "prepare_data.py has 131 lines"),
    ("files", {"tools/report.py": "\n" * 121}, "tools/report.py has 121 lines"),
    ("files", {"tools/benchmarks/layer.py": "\n" * 301}, "tools/benchmarks/layer.py has 301 lines"),
    ("functions", {"litgpt_moe/loss.py": "def f():\n" + "    x = 1\n" * 60}, "loss.py:1: f has 61 lines"),
    ("lines", {"litgpt_moe/loss.py": "# " + "x" * 109}, "loss.py:1: 111 characters"),
    ("top level", {"helper.py": ""}, "helper.py"),
]
ALLOWED = {
    "generate.py": "from litgpt_moe.generation.decode import generate\nimport moe_layers",
    "moe_layers.py": "from litgpt_moe.kernels.rows import Plan",
    "litgpt_moe/__init__.py": "",
    "litgpt_moe/kernels/cpu.py": "from litgpt_moe.kernels.rows import Plan",
    "litgpt_moe/config.py": "def f():\n    # LitGPT's Config binds its class late too\n    import moe_layers",
    "litgpt_moe/training/run.py": "from litgpt_moe import __version__\nfrom litgpt_moe.data import module",
    "litgpt_moe/serving/app.py": "from litgpt_moe.training.run import Run",
    "litgpt_moe/data/text.py": "def f():\n    import torch  # half a second that --help has no use for",
    "tools/report.py": "import run_train\nfrom tools import lock" + "\n" * 118,
    "tools/lock.py": "\n" * 133,
    "tests/data/test_a.py": "from helpers.runs import run\nfrom conftest import ROOT",
}


@pytest.mark.parametrize("rule", RULES)
def test_the_project_keeps_the_rule(rule: str) -> None:
    assert RULES[rule](Tree.of(ROOT)) == []


@pytest.mark.parametrize(("rule", "files", "problem"), BROKEN)
def test_a_tree_that_breaks_the_rule_is_found(rule: str, files: dict[str, str], problem: str) -> None:
    (found,) = RULES[rule](Tree(ALLOWED | files))
    assert problem in found


@pytest.mark.parametrize("rule", RULES)
def test_a_tree_that_keeps_all_rules_passes(rule: str) -> None:
    assert RULES[rule](Tree(ALLOWED)) == []


def test_no_package_has_more_than_a_quarter_of_the_lines() -> None:
    sizes: dict[str, int] = {}
    for path, text in Tree.of(ROOT).files.items():
        if not path.startswith("tests/"):
            part = path.removeprefix("litgpt_moe/").split("/")[0]
            sizes[part] = sizes.get(part, 0) + len(text.splitlines())
    largest = max(sizes, key=lambda part: sizes[part])
    assert sizes[largest] <= sum(sizes.values()) / 4, f"{largest} has more than a quarter of the lines"
