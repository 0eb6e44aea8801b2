"""examples/quickstart.ipynb is a valid notebook that runs the demo."""

import ast
import json

from nybble.cli.parse import parse
from nybble.options.commands import DistillOptions
from tests.helpers.pages import ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
# The notebook writes a folder of its own and may be run again.
OWN = {"output_dir": "runs/demo", "overwrite": False}


def code_cells() -> list[str]:
    """Sources of the code cells."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_is_committed_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook["cells"])


def test_the_cells_compile() -> None:
    assert len(code_cells()) >= 5
    for cell in code_cells():
        compile(cell, NOTEBOOK.name, "exec")


def test_the_notebook_runs_the_demo_recipe() -> None:
    (call,) = (
        node
        for node in ast.walk(ast.parse(code_cells()[0]))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "nybble.distill"
    )
    keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    demo = parse(["distill", "--config", str(ROOT / "recipes" / "demo.toml")])
    assert DistillOptions.of(**keywords | OWN) == demo
