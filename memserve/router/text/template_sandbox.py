"""A chat template as Jinja runs it: Hugging Face's settings, in Jinja's immutable sandbox.

The sandbox keeps a template from everything outside it: no files, no imports, no attribute that leads out.
It does not bound time or memory, and no check of single operations could (forty lists, each with the one
before it twice, are 2^40 items once they are printed): that is done around the process in which all this
runs (`template_process.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox


class Refusal(jinja2.TemplateError):
    """The template called raise_exception."""


class TooLong(Exception):
    """The template wrote more than it may."""


def compile_template(source: str) -> jinja2.Template:
    """Raises whatever Jinja does on a broken template."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def render_template(template: jinja2.Template, names: Mapping[str, object], max_chars: int) -> str:
    """The text for `names`. Raises Refusal, TooLong, or whatever a template can fail with."""
    pieces: list[str] = []
    num_chars = 0
    for piece in template.generate(names):
        num_chars += len(piece)
        if num_chars > max_chars:
            raise TooLong
        pieces.append(piece)
    return "".join(pieces)


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which marks for training what the assistant wrote: its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's HTML escapes, as Hugging Face's filter of the same name."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise Refusal(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
