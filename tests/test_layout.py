"""How the package is laid out: imports go down only, heavy libraries stay where they belong."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moeprune

PACKAGE = Path(moeprune.__file__).parent
REPOSITORY = Path(__file__).parents[1]

LEVELS = (
    (
        "errors",
        "intervals",
        "scores",
        "selection",
        "regression",
        "kernels",
        "sources.lookalikes",
        "cli.options",
        "figure",
        "markup",
        "png",
    ),
    (
        "document",
        "architecture",
        "plan",
        "configuration",
        "evidence",
        "forgetting",
        "files",
        "header",
        "preprocessing",
        "digits",
        "routed",
        "sources.given",
        "sources.modules",
    ),
    (
        "report",
        "text",
        "markdown",
        "flops",
        "merging",
        "gate",
        "plan_file",
        "tensors",
        "soft_moe",
        "checkpoint",
        "images",
        "sources.interface",
        "sources.bwconrad_layer",
        "sources.lucidrains",
        "sources.fkodom",
        "draw",
    ),
    (
        "annotations",
        "junit",
        "size",
        "data",
        "contributions",
        "surgery",
        "sources.checks",
        "state_dict",
        "streaming",
        "html",
        "trade_off",
    ),
    (
        "output",
        "runtime",
        "narrowing",
        "statistics",
        "sources.bwconrad",
    ),
    (
        "cli.command",
        "sources",
        "masses",
    ),
    (
        "cli.config",
        "description",
    ),
    (
        "adopted",
        "cli.inspect",
    ),
    ("model",),
    (
        "calibration",
        "latency",
        "train",
        "parity",
        "cli.opening",
    ),
    (
        "compensation",
        "evaluation",
        "conversion",
        "adoption",
        "planning",
        "page",
    ),
    (
        "pruning",
        "oracle",
        "cli.convert",
    ),
    (
        "search",
        "sweep",
        "cli.analyze",
    ),
    (
        "demo",
        "frontier",
        "cli.prune",
    ),
    (
        "plot",
        "cli.demo",
    ),
    ("cli.eval",),
    ("cli",),
    ("__main__",),
)
"""A module imports from levels above its own in this table only, never from its own or below."""

WITHOUT_TORCH = {
    "errors", "plan", "plan_file", "gate", "evidence", "flops", "intervals", "architecture", "report",
    "files", "header", "preprocessing", "output", "tensors", "size", "description", "__init__", "sources",
    "configuration", "document", "text", "markdown", "annotations", "junit", "cli.config",
    "figure", "markup", "png", "draw", "html", "trade_off",
}  # fmt: skip
TOP_LEVEL = {"moeprune", "tests", "pyproject.toml", "README.md", "CHANGELOG.md"}
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
MODULES = sorted(FILES)


def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


@functools.cache
def imports(module: str, lazy: bool = True) -> tuple[str, ...]:
    """Dotted names that a module imports when it runs: not those under TYPE_CHECKING.

    Args:
        lazy: with those inside functions.
    """
    names: list[str] = []
    waiting: list[ast.AST] = [tree(module)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names += (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            assert node.module is not None
            names += (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)
    return tuple(names)


def imported_modules(module: str, lazy: bool = True) -> set[str]:
    """The modules of the package that a module imports."""
    names = [name.removeprefix("moeprune.") for name in imports(module, lazy) if name.startswith("moeprune.")]
    return {found for name in names if (found := module_of(name)) is not None}


def module_of(name: str) -> str | None:
    """The module that a dotted name stands in, without the package's own name."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def libraries(module: str, lazy: bool = True) -> set[str]:
    return {name.split(".")[0] for name in imports(module, lazy)}


def test_the_table_names_every_module():
    named = [module for level in LEVELS for module in level]
    assert sorted([*named, "__init__"]) == MODULES


@pytest.mark.parametrize(
    ("level", "module"), [(i, module) for i, level in enumerate(LEVELS) for module in level]
)
def test_imports_go_down_only(level, module):
    lower = {name for names in LEVELS[:level] for name in names}
    assert imported_modules(module) <= lower


@pytest.mark.parametrize("level", range(1, len(LEVELS)))
def test_no_level_is_higher_than_it_must_be(level):
    """Every module of a level needs one of the level right below."""
    for module in LEVELS[level]:
        assert imported_modules(module) & set(LEVELS[level - 1]), module


def test_the_package_itself_imports_nothing_of_it_at_once():
    assert imported_modules("__init__", lazy=False) == set()


@pytest.mark.parametrize("module", sorted(WITHOUT_TORCH))
def test_plain_modules_and_all_they_import_do_without_torch(module):
    waiting, seen = [module], set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        assert not libraries(name) & {"torch", "numpy", "safetensors"}, name
        waiting += imported_modules(name) - seen


def test_the_command_line_imports_torch_in_its_commands_only():
    waiting, seen = ["__main__", "cli"], set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        assert not libraries(name, lazy=False) & {"torch", "numpy", "safetensors", "rich"}, name
        waiting += imported_modules(name, lazy=False) - seen
    assert {"gate", "plan", "errors"} <= seen


def users_of(library: str) -> set[str]:
    return {module for module in MODULES if library in libraries(module)}


def test_libraries_are_used_where_they_belong():
    assert all(name.startswith("cli.") for name in users_of("typer"))
    assert users_of("rich") == {"text"}
    assert users_of("safetensors") == {"checkpoint", "data"}
    assert users_of("sklearn") == {"digits"}
    assert "sklearn" not in libraries("digits", lazy=False)
    assert users_of("triton") == {"kernels"}
    assert "kernels" not in imported_modules("routed", lazy=False)
    assert users_of("PIL") <= {"data", "images"}
    assert "PIL" not in libraries("data", lazy=False) | libraries("images", lazy=False)


def test_the_package_imports_its_dependencies_only():
    known = {
        "torch", "numpy", "typer", "safetensors", "rich", "tqdm", "tomli", "sklearn", "PIL", "triton",
        "moeprune",
    }  # fmt: skip
    for module in MODULES:
        optional = {"sources.bwconrad": {"soft_moe"}, "plot": {"matplotlib"}, "merging": {"scipy"}}
        own = optional.get(module, set())
        assert libraries(module) <= known | own | sys.stdlib_module_names, module
        assert not libraries(module, lazy=False) & own, module


def test_only_the_file_of_a_library_knows_its_name():
    of_libraries = {"sources.bwconrad"}
    for module in MODULES:
        assert not imported_modules(module) & of_libraries or module == "sources", module


def test_the_repository_holds_little_at_its_top():
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    found = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    top = {name.split("/")[0] for name in found.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} == TOP_LEVEL


def public_definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if child.name.startswith("_"):
                continue
            yield f"{prefix}.{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from public_definitions(child, f"{prefix}.{child.name}")


@pytest.mark.parametrize("module", MODULES)
def test_everything_public_has_a_docstring(module):
    parsed = tree(module)
    assert ast.get_docstring(parsed)
    lacking = [name for name, node in public_definitions(parsed, module) if not ast.get_docstring(node)]
    assert lacking == []


def test_what_the_package_offers_is_there_and_nothing_else():
    for name in moeprune.__all__:
        assert callable(getattr(moeprune, name))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = moeprune.nonsense
