"""What autodoc and napoleon would read otherwise.

* "Source: ..." is a paragraph, whose later lines may hang. Without help they would become a definition list.
* An attribute's docstring, and what follows "Returns:", are sentences. Napoleon takes words before a colon for a type.
* "E." alone is a size's letter. It would become the first item of a list.
* A dataclass writes ``<factory>`` for a default that is made anew each time, which is no Python.
"""

import re
from typing import Any

from sphinx.application import Sphinx

LETTER = re.compile(r"^( *(?::param \w+: )?)([A-Z]\.)")
"""A line, or a parameter's description, that starts with one letter and a full stop."""

COLON = "\ue000"
"""Stands for a colon while napoleon looks; a code point that no text has."""


def _before_napoleon(_app: Sphinx, what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    after_returns = in_source = False
    for number, line in enumerate(lines):
        text = line.strip()
        in_source = bool(text) and (in_source or text.startswith("Source: "))
        if in_source:
            lines[number] = text
        if after_returns or (number == 0 and what in ("attribute", "data", "property")):
            lines[number] = lines[number].replace(": ", f"{COLON} ")
        after_returns = text == "Returns:"


def _after_napoleon(_app: Sphinx, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    lines[:] = [LETTER.sub(r"\1\\\2", line.replace(COLON, ":")) for line in lines]


def _signature(
    _app: Sphinx, _what: str, _name: str, _obj: Any, _options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    return signature and signature.replace("<factory>", "..."), returns


def setup(app: Sphinx) -> dict[str, Any]:
    """Put a step before napoleon's, one after it, and one on signatures."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", _before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", _after_napoleon, priority=600)
    app.connect("autodoc-process-signature", _signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
