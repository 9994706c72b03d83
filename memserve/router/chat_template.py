"""Messages to one prompt, by the model's own Jinja template, as `transformers.apply_chat_template` renders
it.

The template comes from the model folder or from the operator's `--chat-template` file, never from a request.
It is still not trusted: it runs in Jinja's immutable sandbox, without files or imports, under a deadline and
with bounds on what it may build. The messages are plain data. Rendering may take a while, so callers do it
off the event loop.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec
from jinja2.exceptions import SecurityError

from memserve.errors import ModelError, RequestError
from memserve.router.tokenizer_files import one_line, read_json, special_tokens

_MAX_TEMPLATE_BYTES = 1 << 20
_MAX_REPEATED_ITEMS = 1 << 20
_MAX_POWER_BITS = 4096

TemplateValue = str | int | float | bool | None


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


class _TokenizerConfig(msgspec.Struct):
    chat_template: str | list[_NamedTemplate] | None = None


class ChatTemplate:
    """One compiled template; `render` may be called from any thread."""

    def __init__(
        self,
        source: str,
        named_tokens: Mapping[str, str],
        *,
        timeout_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`named_tokens` (bos_token, …) are variables of the template. Raises ModelError on bad syntax."""
        self._environment = _Environment(clock)
        self._named_tokens = dict(named_tokens)
        self._timeout_s = timeout_s
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelError(f"the chat template is broken: {one_line(error)}") from None

    @classmethod
    def load(cls, path: Path, override: Path | None = None, *, timeout_s: float = 5.0) -> ChatTemplate | None:
        """The template of `override` (a file the operator names), else of the folder; None where it has none.

        `path` is a model folder, or a tokenizer.json in one. In the folder, chat_template.jinja goes before
        tokenizer_config.json, whose `chat_template` is one template or a list of named ones (then the one
        named "default"). Raises ModelError if a file that should be there is missing or broken.
        """
        folder = path if path.is_dir() else path.parent
        source = _read_text(override) if override is not None else _folder_source(folder)
        return None if source is None else cls(source, special_tokens(folder), timeout_s=timeout_s)

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        max_chars: int,
        add_generation_prompt: bool = True,
        variables: Mapping[str, TemplateValue] | None = None,
    ) -> str:
        """The prompt for `messages` (each with a role and a content).

        `variables` are further ones of the template (enable_thinking, …); they replace none of its own. A
        template that refuses the messages, fails on them, takes too long or writes more than `max_chars`
        raises RequestError.
        """
        names: dict[str, object] = {
            **(variables or {}),
            **self._named_tokens,
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        pieces: list[str] = []
        num_chars = 0
        with self._environment.deadline(self._timeout_s):
            try:
                for piece in self._template.generate(names):
                    self._environment.check_deadline()
                    num_chars += len(piece)
                    if num_chars > max_chars:
                        raise _too_long(max_chars)
                    pieces.append(piece)
            except RequestError:
                raise
            except _Refusal as error:
                raise RequestError(one_line(error), param="messages") from None
            except Exception as error:  # a template can fail in every way that Python can
                reason = f"{type(error).__name__}: {one_line(error)}"
                raise RequestError(f"the chat template failed: {reason}", param="messages") from None
        return "".join(pieces)


def _folder_source(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return _read_text(file)
    config = read_json(folder / "tokenizer_config.json", _TokenizerConfig) or _TokenizerConfig()
    if not isinstance(config.chat_template, list):
        return config.chat_template
    by_name = {named.name: named.template for named in config.chat_template}
    return by_name.get("default")


def _read_text(file: Path) -> str:
    try:
        if file.stat().st_size > _MAX_TEMPLATE_BYTES:
            raise ModelError(f"the chat template {file} is larger than {_MAX_TEMPLATE_BYTES} bytes")
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"the chat template {file} cannot be read: {one_line(error)}") from None


class _Refusal(jinja2.TemplateError):
    """The template called raise_exception."""


class _Deadline(threading.local):
    """When the render that runs in this thread must be done, on the environment's clock."""

    at: float | None = None


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Hugging Face's settings, and a sandbox that also bounds time and size.

    Jinja calls back for every attribute, item and call, which is where the deadline is looked at; `range` is
    bounded by the sandbox itself (100,000), repetition and powers by `call_binop`.
    """

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
        )
        self._clock = clock
        self._deadline = _Deadline()
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def deadline(self, timeout_s: float) -> _DeadlineScope:
        """A scope in which this thread's render has so many seconds."""
        return _DeadlineScope(self._deadline, self._clock() + timeout_s)

    def check_deadline(self) -> None:
        """Raises RequestError once the deadline has passed."""
        if self._deadline.at is not None and self._clock() > self._deadline.at:
            raise RequestError("the chat template took too long for these messages", param="messages")

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.check_deadline()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.check_deadline()
        return super().getitem(obj, argument)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        self.check_deadline()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.check_deadline()
        if operator == "**":
            if not _small_power(left, right):
                raise SecurityError("a power that is too large")
        else:
            for items, count in ((left, right), (right, left)):
                repeats = isinstance(items, (str, list, tuple)) and isinstance(count, int)
                if repeats and len(items) * count > _MAX_REPEATED_ITEMS:
                    raise SecurityError("a repetition that is too long")
        return super().call_binop(context, operator, left, right)


class _DeadlineScope:
    def __init__(self, deadline: _Deadline, at: float) -> None:
        self._deadline = deadline
        self._at = at

    def __enter__(self) -> None:
        self._deadline.at = self._at

    def __exit__(self, *_: object) -> None:
        self._deadline.at = None


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what the assistant wrote, for training; here just its
    body.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _small_power(base: object, exponent: object) -> bool:
    if not isinstance(base, int) or not isinstance(exponent, int):
        return True
    return exponent < 0 or base.bit_length() * exponent <= _MAX_POWER_BITS


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
    raise _Refusal(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _too_long(max_chars: int) -> RequestError:
    return RequestError(
        f"the messages make a prompt of more than {max_chars} characters, which cannot fit the context",
        code="context_length_exceeded",
        param="messages",
    )
