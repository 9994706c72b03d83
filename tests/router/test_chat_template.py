"""Chat templates: as transformers renders them, and what a hostile one cannot do."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import memserve
from memserve.errors import ModelError, RequestError
from memserve.router.chat_template import ChatTemplate

TINY_MODEL = Path(memserve.__file__).parent / "tiny_model"
MINIMIND = Path(__file__).parents[2].parent / "shared" / "data" / "tokenizers" / "minimind_6400"

MESSAGES = [
    {"role": "system", "content": 'Be <brief> & "kind".'},
    {"role": "user", "content": "Hi 👋\nthere"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "{{ 7 * 7 }} {% raw %}"},
]


def render(source: str, **variables: str | int | bool) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>"})
    return template.render([{"role": "user", "content": "hi"}], max_chars=10_000, variables=variables)


# --- like transformers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [TINY_MODEL, MINIMIND], ids=lambda folder: folder.name)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_same_text_as_transformers(folder: Path, add_generation_prompt: bool) -> None:
    if not folder.exists():
        pytest.skip(f"{folder} is not here")
    transformers = pytest.importorskip("transformers")
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    template = ChatTemplate.load(folder)
    assert template is not None
    expected = oracle.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    rendered = template.render(MESSAGES, max_chars=10_000, add_generation_prompt=add_generation_prompt)
    assert rendered == expected


def test_names_filters_and_blocks() -> None:
    assert render("{{ bos_token }}{{ messages[0] | tojson }}") == '<s>{"role": "user", "content": "hi"}'
    assert render("{{ '<é>' | tojson }}") == '"<é>"'
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "hi"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{{ strftime_now('%Y') | int > 2000 }}") == "True"
    assert render("{% if tools is none and not missing %}x{% endif %}") == "x"
    assert render("  {% if true %}\n  a\n  {% endif %}\n") == "  a\n"


def test_variables_of_the_request_replace_none_of_the_templates_own() -> None:
    assert render("{{ thinking }}", thinking=True) == "True"
    assert render("{{ messages | length }}{{ bos_token }}", messages="x", bos_token="y") == "1<s>"


# --- where templates come from -----------------------------------------------------------------------------


def load_text(folder: Path, override: Path | None = None) -> str | None:
    template = ChatTemplate.load(folder, override)
    return None if template is None else template.render([], max_chars=100)


def test_sources_in_order(tmp_path: Path) -> None:
    # 1. none at all
    assert load_text(tmp_path) is None
    # 2. a config without one
    config = tmp_path / "tokenizer_config.json"
    config.write_text("{}")
    assert load_text(tmp_path) is None
    # 3. several with names
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert load_text(tmp_path) == "named"
    # 4. one
    config.write_text(json.dumps({"chat_template": "single {{ bos_token }}", "bos_token": "<s>"}))
    assert load_text(tmp_path) == "single <s>"
    assert load_text(tmp_path / "tokenizer.json") == "single <s>"
    # 5. a file of its own goes first
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_text(tmp_path) == "file"
    # 6. the operator's goes before all
    override = tmp_path / "mine.jinja"
    override.write_text("mine")
    assert load_text(tmp_path, override) == "mine"


def test_broken_sources(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        ChatTemplate.load(tmp_path, tmp_path / "missing.jinja")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match="cannot be read"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("x" * (1 << 20) + "x")
    with pytest.raises(ModelError, match="larger"):
        ChatTemplate.load(tmp_path)
    with pytest.raises(ModelError, match="broken"):
        ChatTemplate("{% if %}", {})


# --- refusals and hostile templates ------------------------------------------------------------------------


def test_a_refusal_is_told_in_the_templates_words() -> None:
    with pytest.raises(RequestError, match=r"^roles must alternate$") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "source",
    [
        "{{ missing.attribute }}",
        "{{ 1 + 'a' }}",
        "{{ ().__class__.__bases__[0].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10**6) %}x{% endfor %}",
        "{{ 'x' * 10**9 }}",
        "{{ 10 ** 100000 }}",
        "{{ [0] * 10**9 }}",
        "{{ (10**9) * 'x' }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_what_a_template_cannot_do(source: str) -> None:
    with pytest.raises(RequestError, match="the chat template failed"):
        render(source)


def test_output_is_bounded() -> None:
    with pytest.raises(RequestError) as caught:
        render("{% for i in range(99999) %}{{ i }}{% endfor %}")
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ i }}{% endfor %}",
        "{% for i in range(99999) %}{% set x = messages[0].content %}{% endfor %}",
    ],
)
def test_time_is_bounded(source: str) -> None:
    ticks: Callable[[], int] = itertools.count().__next__
    template = ChatTemplate(source, {}, timeout_s=20, clock=ticks)
    with pytest.raises(RequestError, match="too long"):
        template.render([{"role": "user", "content": "hi"}], max_chars=10**9)
    assert ticks() < 100
