"""Messages to one prompt, by the model's own Jinja template, as transformers' apply_chat_template does it.

The template comes from the model folder or from the operator's `--chat-template` file, never from a request.
It is still not trusted: it runs in a sandbox (`template_sandbox.py`) in a process of its own, whose time and
memory the kernel bounds (`template_process.py`). The messages are plain data. `render` blocks, so callers do
it off the event loop.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from memserve.errors import ModelError, Overloaded, RequestError
from memserve.router.text.template_process import Answer, Job, Outcome, Setup, TemplateProcess
from memserve.router.text.tokenizer_files import one_line, read_json, special_tokens

logger = logging.getLogger(__name__)

_MAX_TEMPLATE_BYTES = 1 << 20

TemplateValue = str | int | float | bool | None


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


class _TokenizerConfig(msgspec.Struct):
    chat_template: str | list[_NamedTemplate] | None = None


class ChatTemplate:
    """One compiled template; `render` may be called from any thread. Its process ends with it."""

    def __init__(
        self,
        source: str,
        named_tokens: Mapping[str, str],
        *,
        timeout_s: float = 5.0,
        memory_bytes: int = 512 << 20,
    ) -> None:
        """`named_tokens` (bos_token, …) are variables of the template. Raises ModelError on bad syntax.

        `timeout_s` and `memory_bytes` (of address space, some 30 MB of which are Python's own) bound one
        render.
        """
        self._named_tokens = dict(named_tokens)
        self._process = TemplateProcess(Setup(source, timeout_s, memory_bytes))
        weakref.finalize(self, self._process.close)
        compiled = self._process.compile()
        if compiled.outcome is not Outcome.DONE:
            reason = compiled.text or "it takes too much time or memory"
            raise ModelError(f"the chat template is broken: {reason}")

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
        template that refuses the messages, fails on them, takes too much time or memory or writes more than
        `max_chars` raises RequestError; Overloaded if those before it took all of its time.
        """
        names: dict[str, object] = {
            **(variables or {}),
            **self._named_tokens,
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        answer = self._process.run(Job(names, max_chars))
        if answer is None:
            raise Overloaded("chat templates are being rendered slowly", retry_after_s=1.0)
        if answer.outcome is Outcome.DONE:
            return answer.text
        raise _refusal(answer, max_chars)


def _refusal(answer: Answer, max_chars: int) -> RequestError:
    """What the client is told: the template's own words, but none of Python's; those are for the log."""
    match answer.outcome:
        case Outcome.REFUSED:
            return RequestError(answer.text, param="messages")
        case Outcome.TOO_LONG:
            return RequestError(
                f"the messages make a prompt of more than {max_chars} characters, which cannot fit the "
                "context",
                code="context_length_exceeded",
                param="messages",
            )
        case Outcome.TIMEOUT:
            return RequestError("the chat template took too long for these messages", param="messages")
    logger.debug("the chat template failed: %s", answer.text or "its process ended")
    return RequestError("the chat template failed on these messages", param="messages")


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
