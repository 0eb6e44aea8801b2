"""Links and images lead somewhere."""

from pathlib import Path

import pytest

from tests.helpers.pages import PAGES, ROOT, heading_ids, links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in links(page):
        if link.startswith(("https://", "#")):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve()
        assert file.is_file(), link
        if anchor:
            assert anchor in heading_ids(file), link


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert {page for page in pages if f": {page}" not in navigation} == set()
