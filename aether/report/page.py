"""From sections to one HTML file that needs no other and no network."""

import base64
from collections.abc import Mapping, Sequence
from importlib import resources

from aether.report.section import Item, Passage, Picture, Section, Table, shown


def render(title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> bytes:
    """Return the page of a run.

    Args:
      title: its name.
      facts: a few words on it, each under a label.
      sections: in this order.
    """
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = shown
    environment.filters["data_url"] = _data_url
    environment.filters["kind"] = _kind
    template = environment.from_string((resources.files(__package__) / "page.html").read_text(encoding="utf-8"))
    return template.render(title=title, facts=facts, sections=sections).encode()


def _data_url(picture: Picture) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.png).decode()


def _kind(item: Item) -> str:
    return {Table: "table", Picture: "picture", Passage: "passage"}[type(item)]
