"""How the package is laid out: imports go down only, and heavy libraries stay out of the start-up."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moeprune

PACKAGE = Path(moeprune.__file__).parent
REPOSITORY = Path(__file__).parents[1]
LEVELS = """
    errors amounts records plan layers files data models calibration evaluation pruning demo report cli
""".split()  # noqa: SIM905
"""A package imports from those to its left."""
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
TOP_LEVEL = {"moeprune", "tests", "pyproject.toml", "README.md", "CHANGELOG.md"}


def imports(module: str) -> set[str]:
    """The modules of the package that a module imports, also inside functions, not under TYPE_CHECKING."""
    names: list[str] = []
    waiting: list[ast.AST] = [ast.parse(FILES[module].read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.ImportFrom) and node.module:
            names += (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)
    own = [name.removeprefix("moeprune.") for name in names if name.startswith("moeprune.")]
    return {name if name in FILES else name.rpartition(".")[0] for name in own} - {""}


@pytest.mark.parametrize("module", sorted(set(FILES) - {"__init__", "__main__"}))
def test_imports_go_down_only(module):
    own = LEVELS.index(module.split(".")[0])
    assert all(LEVELS.index(name.split(".")[0]) <= own for name in imports(module))


def test_no_imports_go_round_in_a_circle():
    left = {module: imports(module) - {module} for module in FILES}
    while free := {module for module, needed in left.items() if not needed & set(left)}:
        left = {module: needed for module, needed in left.items() if module not in free}
    assert not left


def test_start_up_does_without_heavy_libraries():
    check = "import sys, moeprune.cli; print(*({'torch', 'numpy', 'scipy', 'rich'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", check], text=True).split() == []


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


@pytest.mark.parametrize("module", sorted(FILES))
def test_everything_public_has_a_docstring(module):
    parsed = ast.parse(FILES[module].read_text(encoding="utf-8"))
    assert ast.get_docstring(parsed)
    assert [name for name, node in public_definitions(parsed, module) if not ast.get_docstring(node)] == []


def test_what_the_package_offers_is_there_and_nothing_else():
    for name in moeprune.__all__:
        assert callable(getattr(moeprune, name))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = moeprune.nonsense
