"""Packages import only packages above them in the order of the data flow, and take no private names from each other."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "nybble"
# The top of the house first. What has a dot after it is a package; the others are modules.
ORDER = [
    "errors", "schema", "registry", "runtime", "processes", "files", "callbacks", "options", "console", "quant",
    "models", "data", "compression", "qat", "training", "evaluation", "export", "tasks", "nls", "run", "report",
    "workflows", "keywords", "api", "cli", "__init__", "__main__",
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


def test_every_package_has_its_place() -> None:
    assert {place(path) for path in FILES} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_upwards(path: Path) -> None:
    own = place(path)
    for package, name in imports(ast.parse(path.read_text())):
        assert package in ORDER, f"{path} imports {package}"
        assert ORDER.index(package) <= ORDER.index(own), f"{own} imports {package}, which stands below it"
        assert package == own or not name.startswith("_") or name == "__version__", (
            f"{path} takes the private name {name} from {package}"
        )


def test_only_quant_rounds_or_clamps_weights() -> None:
    rounding = {
        "round", "round_", "clamp", "clamp_", "clip", "floor", "ceil", "trunc", "fake_quantize_per_tensor_affine",
    }  # fmt: skip
    # Not weights: position ids, and the time steps of a scan.
    allowed = {("export/runtime_model.py", "clamp"), ("export/openvino/substitutes.py", "clamp")}
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in rounding
                and place(path) != "quant"
            ):
                found.add((str(path.relative_to(SOURCE)), node.func.attr))
    assert found <= allowed


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_fit_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350, f"{path} does several things; split it"
