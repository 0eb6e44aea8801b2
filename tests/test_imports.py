"""Packages import only packages above them in the order of the data flow, and take no private names from each other."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "nybble"
# The top of the house first. What has a dot after it is a package; the others are modules.
ORDER = [
    "errors", "schema", "registry", "container", "runtime", "rendezvous", "processes", "files", "callbacks", "options",
    "console", "quant", "models", "data", "compression", "qat", "training", "evaluation", "export", "tasks", "nls",
    "run", "report", "workflows", "keywords", "api", "cli", "__init__", "__main__",
]  # fmt: skip


def place(path: Path) -> str:
    """The package that a file is in, or its own name at the top."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imports(tree: ast.AST) -> list[tuple[str, str]]:
    """(package, name) of everything that is imported from nybble."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nybble":
            parts = (node.module or "").split(".")[1:]
            found += [(parts[0] if parts else alias.name, alias.name) for alias in node.names]
    return found


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.AST]:
    """The syntax of every file."""
    return {path: ast.parse(path.read_text()) for path in FILES}


def test_every_package_has_its_place() -> None:
    assert {place(path) for path in FILES} == set(ORDER)


def test_imports_point_upwards(trees: dict[Path, ast.AST]) -> None:
    wrong = []
    for path, tree in trees.items():
        own = place(path)
        for package, name in imports(tree):
            if package not in ORDER:
                wrong.append(f"{path} imports {package}")
            elif ORDER.index(package) > ORDER.index(own):
                wrong.append(f"{path} imports {package}, which stands below {own}")
            elif package != own and name.startswith("_") and name != "__version__":
                wrong.append(f"{path} takes the private name {name} from {package}")
    assert not wrong


def test_no_files_import_each_other_in_a_circle(trees: dict[Path, ast.AST]) -> None:
    """Imports for type checkers and inside functions count too: a file can be read without those that use it."""
    modules = {".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path for path in trees}
    modules |= {name.removesuffix(".__init__"): path for name, path in modules.items()}
    sorter: TopologicalSorter[Path] = TopologicalSorter()
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                named = [modules.get(f"{node.module}.{alias.name}", modules.get(node.module)) for alias in node.names]
                sorter.add(path, *(other for other in named if other is not None))
    sorter.prepare()  # raises CycleError, which names the files


def test_only_quant_rounds_or_clamps_weights(trees: dict[Path, ast.AST]) -> None:
    rounding = {
        "round", "round_", "clamp", "clamp_", "clip", "floor", "ceil", "trunc", "fake_quantize_per_tensor_affine",
    }  # fmt: skip
    # Not weights: position ids, and the time steps of a scan.
    allowed = {("export/runtime_model.py", "clamp"), ("export/openvino/substitutes.py", "clamp")}
    found = set()
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in rounding
                and place(path) != "quant"
            ):
                found.add((str(path.relative_to(SOURCE)), node.func.attr))
    assert found <= allowed


def test_files_fit_in_one_sitting() -> None:
    long = [path for path in FILES if len(path.read_text().splitlines()) > 350]
    assert not long, "they do several things; split them"
