"""The arrows between the packages, read from the source: suites -> spiel, baselines."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("spiel", "baselines", "suites")
ALLOWED = {"spiel": {"spiel"}, "baselines": {"baselines"}, "suites": set(PACKAGES)}


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def imported(tree):
    """Names that `tree` imports from our packages, wherever in it: deferred ones and types too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            submodules = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in MODULES else node.module for name in submodules)


def ours(path):
    names = imported(ast.parse(path.read_text()))
    return {name for name in names if name.split(".")[0] in PACKAGES}


def find_cycle(graph):
    """Modules that import one another in a circle, or None."""
    state = {}

    def visit(module, path):
        state[module] = "open"
        for other in sorted(graph[module]):
            if state.get(other) == "open":
                return [*path[path.index(other) :], other]
            if other not in state and (found := visit(other, [*path, other])):
                return found
        state[module] = "done"
        return None

    return next(
        (found for module in graph if module not in state if (found := visit(module, [module]))),
        None,
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows(package):
    for name, path in MODULES.items():
        if name.split(".")[0] == package:
            reached = {other.split(".")[0] for other in ours(path)}
            assert reached <= ALLOWED[package], f"{name} imports {reached - ALLOWED[package]}"


def test_no_cycles():
    graph = {name: (ours(path) & set(MODULES)) - {name} for name, path in MODULES.items()}
    assert len(graph) > 10
    assert find_cycle(graph) is None


def test_a_cycle_would_be_found():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_imports_are_seen(tmp_path):
    source = "import suites.run\nif 1:\n    from spiel import ops\ndef f():\n    import baselines\n"
    tree = ast.parse(source)
    assert set(imported(tree)) == {"suites.run", "spiel.ops", "baselines"}


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "tests/benchmarks").glob("*.py")])
def test_benchmarks_import(name):
    """They are run by `make bench` alone: nothing else would tell that one no longer does."""
    import_module(f"tests.benchmarks.{name}")
