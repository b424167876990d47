"""The house: who may import whom, what may happen on import, how long a module may be.

If these fail, something Ray-free needs a cluster to be tested, or `mmray --help` takes seconds.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "mmray").rglob("*.py"))
JOBS = sorted((ROOT / "jobs").glob("*.py"))

#: From the roof down: a room imports from itself and from the rooms below it.
ROOMS = (
    "__main__",
    "cli",
    "demo",
    "engine",
    "serving",
    "report",
    "verify",
    "rescore",
    "quantize",
    "lease",
    "rejects",
    "budget",
    "ledger",
    "scoring_run",
    "targets",
    "predict",
    "pairs",
    "splits",
    "duplicates",
    "learn",
    "objective",
    "augment",
    "averaging",
    "counts",
    "curves",
    "metrics",
    "bundle",
    "golden",
    "doubt",
    "near",
    "labels",
    "groups",
    "model",
    "preprocess",
    "archive",
    "storage",
    "memory",
    "s3",
    "throttle",
    "refusals",
    "backoff",
    "client",
    "config",
    "errors",
)
LONGEST = 400  # lines; most are under 300

#: What a module may call to define its constants: cheap, and the same on every machine and day.
#: Classes (a capital letter) and everything of pyarrow's type language are allowed besides.
DEFINING = {
    "click.argument",
    "click.option",
    "dataclasses.field",
    "dict",
    "field",
    "frozenset",
    "itertools.count",
    "len",
    "list",
    "logging.getLogger",
    "max",
    "min",
    "np.dtype",
    "np.finfo",
    "np.iinfo",
    "os.cpu_count",
    "range",
    "re.compile",
    "set",
    "sorted",
    "struct.Struct",
    "sum",
    "tuple",
}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def room(path: Path) -> str:
    first = path.relative_to(ROOT / "mmray").parts[0]
    return first.removesuffix(".py")


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module == "mmray":
                yield from ((node.lineno, f"mmray.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def ray_outside_engine(tree: ast.Module, home: str) -> Iterator[str]:
    for line, name in imported(tree):
        if name.split(".")[0] == "ray" and home != "engine":
            yield f"line {line}: imports {name}; only engine/ knows Ray"


def upward(tree: ast.Module, home: str) -> Iterator[str]:
    for line, name in imported(tree):
        parts = name.split(".")
        if name.startswith("."):
            yield f"line {line}: relative import; write mmray..."
        if parts[0] != "mmray" or len(parts) < 2 or parts[1] == "__version__":
            continue
        if parts[1] not in ROOMS:
            yield f"line {line}: imports {name}, which has no place in ROOMS"
        elif home != "__init__" and ROOMS.index(parts[1]) < ROOMS.index(home):
            yield f"line {line}: {home} imports {name} from above"


def work_on_import(tree: ast.Module, home: str = "") -> Iterator[str]:
    yield from _work(tree.body)


def _work(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        match node:
            case ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.AsyncFunctionDef():
                pass
            case ast.Pass() | ast.Expr(value=ast.Constant()):
                pass
            case ast.ClassDef():
                yield from _work(node.body)
            case ast.Assign() | ast.AnnAssign():
                yield from _calls(node)
            case ast.If() if _is_guard(node.test):
                pass
            case ast.Try() if _is_optional_import(node):
                pass
            case _:
                yield f"line {node.lineno}: runs on import: {ast.unparse(node).splitlines()[0]}"


def _calls(node: ast.AST) -> Iterator[str]:
    """The calls in ``node`` that do more than define; what a lambda calls runs later."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Lambda):
            continue
        if isinstance(child, ast.Call) and not _defines(ast.unparse(child.func)):
            yield f"line {child.lineno}: calls {ast.unparse(child.func)} on import"
        yield from _calls(child)


def _defines(function: str) -> bool:
    owner, _, name = function.rpartition(".")
    constant_method = owner.split(".")[-1].isupper() and name == "append"  # a pyarrow schema's
    return function in DEFINING or name[:1].isupper() or owner == "pa" or constant_method


def _is_guard(test: ast.expr) -> bool:
    return ast.unparse(test) in {"TYPE_CHECKING", "__name__ == '__main__'"}


def _is_optional_import(node: ast.Try) -> bool:
    catches = [ast.unparse(handler.type) for handler in node.handlers if handler.type]
    return (
        all(isinstance(inner, (ast.Import, ast.ImportFrom)) for inner in node.body)
        and bool(catches)
        and set(catches) <= {"ImportError", "ModuleNotFoundError"}
    )


def swallowed(tree: ast.Module, home: str = "") -> Iterator[str]:
    """``except:``, and a broad handler that does nothing."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        if node.type is None:
            yield f"line {node.lineno}: bare except"
        elif ast.unparse(node.type) in {"Exception", "BaseException"} and all(
            isinstance(inner, (ast.Pass, ast.Continue)) for inner in node.body
        ):
            yield f"line {node.lineno}: except {ast.unparse(node.type)} that does nothing"


Rule = Callable[[ast.Module, str], Iterator[str]]
RULES: list[Rule] = [ray_outside_engine, upward, work_on_import, swallowed]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_is_in_order(rule: Rule) -> None:
    broken = [
        f"{path.relative_to(ROOT)}: {finding}"
        for path in MODULES
        for finding in rule(parse(path), room(path))
    ]
    assert not broken, "\n".join(broken)


def test_every_room_has_a_place() -> None:
    assert {room(path) for path in MODULES} - {"__init__"} <= set(ROOMS)


def test_modules_can_be_read_in_one_sitting() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    long = {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > LONGEST}
    assert not long


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_job_only_calls_the_command_line(path: Path) -> None:
    names = {name.split(".")[0] for _, name in imported(parse(path))} - set(sys.stdlib_module_names)
    assert names == {"mmray"}
    assert {name for _, name in imported(parse(path)) if name.startswith("mmray")} == {"mmray.cli"}


@pytest.mark.parametrize("argv", [["-c", "import mmray.cli"], ["-m", "mmray", "score", "--help"]])
def test_the_command_line_answers_before_anything_heavy_is_imported(argv: list[str]) -> None:
    report = subprocess.run(
        [sys.executable, "-X", "importtime", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in report.splitlines()}
    assert "click" in loaded, "this is not a report of imports"
    assert not loaded & {"ray", "torch", "torchvision", "transformers", "pandas", "moto"}


@pytest.mark.parametrize(
    ("rule", "home", "source", "finding"),
    [
        (ray_outside_engine, "predict", "def f():\n    from ray import data", "only engine/"),
        (upward, "archive", "from mmray import ledger", "archive imports mmray.ledger from above"),
        (upward, "cli", "import mmray.attic", "no place in ROOMS"),
        (work_on_import, "", "print('hello')", "runs on import: print"),
        (work_on_import, "", "for x in range(9):\n    pass", "runs on import: for"),
        (work_on_import, "", "with open('f') as f:\n    pass", "runs on import: with"),
        (work_on_import, "", "class A:\n    rows = json.load(open('f'))", "calls json.load"),
        (work_on_import, "", "try:\n    go()\nexcept ImportError:\n    pass", "on import: try"),
        (swallowed, "", "try:\n    go()\nexcept:\n    raise", "bare except"),
        (swallowed, "", "for x in y:\n  try:\n    go()\n  except Exception:\n    continue", "noth"),
    ],
)
def test_the_rules_see_what_they_forbid(rule: Rule, home: str, source: str, finding: str) -> None:
    assert any(finding in found for found in rule(ast.parse(source), home))


@pytest.mark.parametrize(
    "source",
    [
        "PATTERN = re.compile('x')\nSCHEMA = pa.schema([pa.field('a', pa.int64())])",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
        "try:\n    import simplejpeg\nexcept ImportError:\n    simplejpeg = None",
        "class A:\n    made: str = field(default_factory=lambda: now().isoformat())",
    ],
)
def test_the_rules_let_definitions_pass(source: str) -> None:
    assert not list(work_on_import(ast.parse(source)))
