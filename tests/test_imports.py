"""Files import only files above them in the order of the data flow; so there are no cycles, and a reader can go top to bottom."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "nybble"
ORDER = [
    "errors", "rows", "config", "grid", "quantized", "families", "models", "chat", "data",
    "compress.start", "compress.blocks", "compress.rtn", "compress.scale_estimation", "compress.awq", "compress.gptq", "compress.blockwise", "compress",
    "layers", "insert", "losses", "teacher", "train", "ranks", "absorb", "checkpoint", "writing", "estimate",
    "console", "export", "export.openvino", "evaluate", "questions", "report", "page",
    "starts", "text", "stages", "post_training", "tuning", "distill", "lessons", "tune", "search", "columns", "compare", "commands", "cli",
    "", "__main__",
]  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole.removeprefix("nybble.") in ORDER else node.module)
    return {name.removeprefix("nybble").removeprefix(".") for name in names if name.split(".")[0] == "nybble"}


def test_every_file_has_its_place() -> None:
    assert sorted(module_name(path) for path in SOURCE.rglob("*.py")) == sorted(ORDER)


def test_imports_point_upwards() -> None:
    wrong = []
    for path in SOURCE.rglob("*.py"):
        name = module_name(path)
        for other in imported(ast.parse(path.read_text())):
            lazy = name == "export" and other == "export.openvino"  # the table of exporters imports them when they are used
            if ORDER.index(other) >= ORDER.index(name) and not lazy:
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_only_the_grid_rounds_or_clamps_weights() -> None:
    rounding = {"round", "round_", "clamp", "clamp_", "clip", "floor", "ceil", "trunc", "fake_quantize_per_tensor_affine"}
    # position ids, not weights
    allowed = {("export.openvino", "clamp")}
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in rounding:
                found.add((module_name(path), node.func.attr))
    assert {(module, call) for module, call in found if module != "grid"} <= allowed
