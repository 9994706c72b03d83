"""Chat templates: as transformers renders them, and what a hostile one cannot do."""

from __future__ import annotations

import gc
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

import memserve
from memserve.errors import ModelError, Overloaded, RequestError
from memserve.router.text.chat_template import ChatTemplate

TINY_MODEL = Path(memserve.__file__).parent / "tiny_model"
MINIMIND = Path(__file__).parents[3].parent / "shared" / "data" / "tokenizers" / "minimind_6400"

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
        "{% include messages[0].content %}",
        "{% for i in range(10**6) %}x{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_what_a_template_cannot_do(source: str) -> None:
    with pytest.raises(RequestError, match=r"^the chat template failed on these messages$"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content * 10**10 }}",
        "{{ [messages] * 10**10 }}",
        "{{ messages[0].content.ljust(10**10) }}",
        "{{ messages[0].content | center(10**10) }}",
        "{{ '%10000000000d' % messages | length }}",
        "{{ messages | tojson(indent=10**10) }}",
        "{{ messages | batch(10**10, 'x') | list }}",
        "{% set n = namespace(s='x') %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s='x') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s='x') %}{% for i in range(40) %}{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}"
        "{% endfor %}",
        "{% set n = namespace(l=[1]) %}{% for i in range(40) %}{% set n.l = [n.l, n.l] %}{% endfor %}"
        "{{ n.l }}",
    ],
)
def test_memory_is_bounded(source: str) -> None:
    template = ChatTemplate(source, {}, memory_bytes=64 << 20, timeout_s=30)
    for _ in range(2):  # the second in a new process, if the first had to be ended
        with pytest.raises(RequestError, match="failed on these messages"):
            template.render([{"role": "user", "content": "hi"}], max_chars=10_000)


def test_output_is_bounded() -> None:
    with pytest.raises(RequestError) as caught:
        render("{% for i in range(99999) %}{{ i }}{% endfor %}")
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    "source",
    [
        # Nothing in the inner loops calls anything
        "{% if messages %}{% set r = range(99999) | list %}{% for i in r %}{% for j in r %}{% endfor %}"
        "{% endfor %}{% endif %}ok",
        # One call of C that cannot be interrupted
        "{% if messages %}{{ (7 ** messages[0].content | length ** 9) ** 99999 }}{% endif %}ok",
    ],
)
def test_time_is_bounded(source: str) -> None:
    template = ChatTemplate(source, {}, timeout_s=0.5)
    with pytest.raises(RequestError, match="too long"):
        template.render([{"role": "user", "content": "x" * 9}], max_chars=10**6)
    # the next is rendered by a new process
    assert template.render([], max_chars=10) == "ok"


def test_one_that_takes_too_long_to_compile() -> None:
    with pytest.raises(ModelError, match="too much time"):
        ChatTemplate("{{ 10 ** (10 ** 9) }}", {}, timeout_s=0.5)


# --- the process --------------------------------------------------------------------------------------------


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def test_the_process_ends_with_its_template() -> None:
    gc.collect()  # those of the tests before
    before = children()
    template = ChatTemplate("{{ messages[0].content }}", {})
    (pid,) = children() - before
    assert template.render([{"content": "é👋"}], max_chars=10) == "é👋"
    assert children() - before == {pid}  # one process, however many renders
    del template
    gc.collect()
    assert children() == before


def test_one_that_was_killed_is_replaced() -> None:
    gc.collect()
    before = children()
    template = ChatTemplate("{{ messages[0].content }}", {})
    (child,) = (psutil.Process(pid) for pid in children() - before)
    child.kill()
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert template.render([{"content": "a"}], max_chars=10) == "a"


def test_renders_from_many_threads() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    with ThreadPoolExecutor(8) as pool:
        texts = [str(i) * 1000 for i in range(64)]
        rendered = pool.map(lambda text: template.render([{"content": text}], max_chars=10_000), texts)
        assert list(rendered) == texts


def test_those_behind_a_slow_render_are_told_to_come_again() -> None:
    template = ChatTemplate(
        "{% if messages %}{{ 10 ** (10 ** messages | length) }}{% endif %}", {}, timeout_s=0.5
    )

    def ask(_: int) -> type[RequestError]:
        with pytest.raises(RequestError) as caught:
            template.render([{"content": "x"}] * 9, max_chars=10)
        return caught.type

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(ask, range(6))) == {Overloaded, RequestError}
