"""Generated pages are up to date."""

import runpy

from tests.helpers.pages import DOCS, README


def test_reference_pages_are_what_the_script_writes() -> None:
    pages = runpy.run_path(str(DOCS / "make_reference.py"))["PAGES"]
    for file, page in pages.items():
        assert (DOCS / "reference" / file).read_text(encoding="utf-8") == page(), "run docs/make_reference.py"


def test_the_table_of_support_is_what_the_exporters_tests_cover() -> None:
    script = runpy.run_path(str(DOCS / "make_reference.py"))
    assert README.read_text(encoding="utf-8") == script["readme_with_table"](), "run docs/make_reference.py"
    assert script["support_table"]().count("✓") > 30


def test_the_drawing_is_what_the_script_writes() -> None:
    drawing = runpy.run_path(str(DOCS / "make_drawing.py"))["drawing"]
    assert (DOCS / "img" / "method.svg").read_text(encoding="utf-8") == drawing(), "run docs/make_drawing.py"
