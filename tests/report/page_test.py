"""The page: what it is given is text and never markup; it needs nothing from elsewhere."""

import re

from aether.report.page import render
from aether.report.section import Passage, Picture, Section, Table

EVIL = "<script>alert(1)</script>\"'&"


def page() -> str:
    items = (
        Table((EVIL, "n"), ((EVIL, 1.5), ("b", None)), EVIL),
        Picture("a.png", b"\x89PNG", EVIL),
        Passage(((EVIL, 1.0), (EVIL, 0.0)), EVIL, (EVIL,)),
    )
    return render(
        EVIL, {EVIL: EVIL}, [Section("one", EVIL, (EVIL,), items), Section("two", "Two", trouble=EVIL)]
    ).decode()


def test_what_it_is_given_is_text():
    assert page().count("<script>") == 1 and "alert(1)" in page()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page()


def test_it_takes_nothing_from_elsewhere():
    text = page()
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]+", text)
    assert "default-src 'none'" in text and "http" not in text.replace("http-equiv", "")


def test_cells_say_what_they_are():
    assert '<td class="number" data-value="1.5">1.5</td>' in page() and '<td class="number">–</td>' in page()
