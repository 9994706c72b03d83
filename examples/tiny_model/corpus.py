"""The training text: everything here comes with a Python installation.

Three kinds of text are gathered from the running interpreter's standard library:

* ``source``    -- module sources outside the test directories;
* ``reference`` -- prose: the language topics of ``pydoc_data``, the text files of the library, and one
  reference page per module made of its docstrings (C modules included, through introspection);
* ``chat``      -- short conversations whose answers are those docstrings, plus a handful of written-out
  replies for greetings and for questions such a small model cannot answer.

Everything is sorted and seeded, so one interpreter always gives one corpus. A module belongs to the
training or to the validation split as a whole, so no docstring is seen on both sides.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dialogue import OFF_TOPIC_PROMPTS, OFF_TOPIC_REPLIES, SMALL_TALK, SYSTEM_PROMPTS

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

VALIDATION_SHARE = 0.03
SPLIT_SALT = "memserve"
"""Chosen once so that the modules everyone asks about (json, os, re, shutil, ...) are in training."""

SMALL_TALK_SHARE = 0.10
"""How many of the conversations are small talk and refusals; the rest is about Python."""

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# Codec tables and build records are numbers and absolute paths, not text worth learning.
SKIPPED_FILES = re.compile(
    r"encodings/(cp|iso|mac|koi|kz|ptcp|tis|palmos|hp_).*|_sysconfigdata.*|topics\.py|stringprep\.py"
)
UNASKED = ("_", "idlelib.", "lib2to3.", "turtledemo.", "pydoc_data.", "xx")
"""Names no conversation is about: private ones, and programs that only happen to live in the library."""

Chat = list[dict[str, str]]


@dataclass
class Entry:
    """One documented object: its dotted name, its signature as written (or empty) and its docstring."""

    name: str
    kind: str  # "module", "class", "function" or "method"
    signature: str
    doc: str


@dataclass
class Corpus:
    """The documents of one split, by kind."""

    source: list[str] = field(default_factory=list)
    reference: list[str] = field(default_factory=list)
    chat: list[str] = field(default_factory=list)

    def characters(self) -> dict[str, int]:
        return {kind: sum(map(len, texts)) for kind, texts in vars(self).items()}


def is_validation(unit: str) -> bool:
    """Decide by name alone, so that adding a module moves no other module across the split."""
    digest = hashlib.sha256(f"{SPLIT_SALT} {unit}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < VALIDATION_SHARE


def library_files(pattern: str) -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = [
        path
        for path in root.rglob(pattern)
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
        and not SKIPPED_FILES.fullmatch("/".join(path.relative_to(root).parts[-2:]))
        and not SKIPPED_FILES.fullmatch(path.name)
    ]
    return sorted(found)


def module_name(path: Path) -> str:
    parts = path.relative_to(sysconfig.get_path("stdlib")).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def public_name(module: str) -> str:
    """The name users import: ``_io`` and ``_pyio`` both implement ``io``."""
    public = re.sub(r"^_(py)?", "", module)
    return public if public in sys.stdlib_module_names else module


# ------------------------------------------------------------------------------------ docstrings


def clean(doc: str) -> str:
    """A docstring as people should read it: dedented, without ReST roles and doubled backquotes."""
    doc = inspect.cleandoc(doc)
    doc = re.sub(r":(?:func|class|mod|meth|exc|attr|data|ref|term|option|const):`~?([^`]+)`", r"`\1`", doc)
    return doc.replace("``", "`").strip()


def source_entries(module: str, text: str) -> list[Entry]:
    """The documented objects of one Python source, read from its syntax tree and not by importing it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(text)
    entries = []
    if doc := ast.get_docstring(tree):
        entries.append(Entry(module, "module", "", clean(doc)))

    def visit(node: ast.AST, prefix: str, kind: str) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            name = f"{prefix}.{child.name}"
            is_class = isinstance(child, ast.ClassDef)
            if doc := ast.get_docstring(child):
                arguments = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
                entries.append(Entry(name, "class" if is_class else kind, arguments, clean(doc)))
            if is_class:
                visit(child, name, "method")

    visit(tree, module, "function")
    return entries


def compiled_entries(module: str) -> list[Entry]:
    """The documented objects of a module written in C: those have no source, so they are imported."""
    try:
        loaded = importlib.import_module(module)
    except ImportError:
        return []
    module = public_name(module)
    entries = []
    if doc := inspect.getdoc(loaded):
        entries.append(Entry(module, "module", "", clean(doc)))

    def add(owner: object, prefix: str, kind: str) -> None:
        for attribute, value in sorted(vars(owner).items()):
            doc = getattr(value, "__doc__", None)
            if not (callable(value) or inspect.isdatadescriptor(value)) or not isinstance(doc, str):
                continue
            if isinstance(value, type) and value.__name__ != attribute:
                continue  # an alias, such as array.ArrayType
            if prefix.startswith("builtins.") and attribute.startswith("__"):
                continue  # every type repeats the same slots
            name = f"{prefix}.{attribute}".removeprefix("builtins.")
            try:
                signature = str(inspect.signature(value))
            except (TypeError, ValueError):
                signature = ""
            is_class = isinstance(value, type)
            if len(doc) > 20 and not doc.startswith("Return self"):
                entries.append(Entry(name, "class" if is_class else kind, signature, clean(doc)))
            if is_class and kind == "function":
                add(value, f"{prefix}.{attribute}", "method")

    add(loaded, module, "function")
    return entries


def compiled_modules() -> list[str]:
    extensions = {path.name.split(".")[0] for path in library_files("lib-dynload/*.so")}
    names = extensions | set(sys.builtin_module_names)
    return sorted(name for name in names if not re.search(r"test|xxlimited|tkinter|^_xx", name))


def reference_page(module: str, entries: list[Entry]) -> str:
    parts = [f"# {module}"]
    for entry in entries:
        if entry.kind == "module":
            parts.append(entry.doc)
        else:
            parts.append(f"## {entry.name}{entry.signature}\n\n{entry.doc}")
    return "\n\n".join(parts) + "\n"


def topics() -> Iterator[tuple[str, str]]:
    """The language reference as ``help()`` shows it, its rulers of asterisks turned into headings."""
    from pydoc_data.topics import topics as pages

    for name in sorted(pages):
        text = re.sub(r"^(\S.*)\n([*=\-~^])\2{2,}$", r"# \1", pages[name].strip(), flags=re.M)
        yield name, text + "\n"


# ------------------------------------------------------------------------------------ conversations


def reflow(text: str, limit: int) -> str:
    """Join the lines of each prose paragraph and keep whole paragraphs up to about ``limit`` characters.

    Indented paragraphs, lists and doctests keep their lines; doctests are fenced as Markdown code.
    """
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.splitlines()
        if any(line.lstrip().startswith(">>>") for line in lines):
            block = "```python\n" + inspect.cleandoc("\n" + paragraph) + "\n```"
        elif any(line.startswith((" ", "-", "*", "|", "#", "+")) for line in lines):
            block = paragraph.rstrip()
        else:
            block = re.sub(r"\s+", " ", " ".join(lines)).strip()
        if kept and sum(map(len, kept)) + len(block) > limit:
            break
        kept.append(block)
    return "\n\n".join(kept).rstrip(":").strip()


def render_chat(messages: Chat) -> str:
    """Exactly what the chat template gives for these messages."""
    return "".join(f"{TURN_START}{m['role']}\n{m['content']}{TURN_END}\n" for m in messages)


QUESTIONS = {
    "module": (
        "Tell me about the module {name}.",
        "What is the {name} module for?",
        "What is {name}?",
        "Explain the {name} module.",
        "What does the module {name} do?",
    ),
    "class": (
        "What is {name}?",
        "What is the class {name} for?",
        "Tell me about {name}.",
        "Explain {name}.",
    ),
    "function": (
        "What does {name} do?",
        "How do I use {name}?",
        "What is {name}?",
        "Explain {name}.",
        "What does the function {name} do?",
    ),
    "method": ("What does {name} do?", "How do I use {name}?", "Explain the method {name}."),
}


def entry_turn(entry: Entry, rng: random.Random) -> Chat | None:
    """A question about one entry and its docstring as the answer; None where that would read badly."""
    leaf = entry.name.rpartition(".")[2]
    answer = reflow(entry.doc, limit=rng.choice((250, 500, 900)))
    if len(answer) < 25 or len(answer) > 1500 or not re.search(r"[a-z]{3,} [a-z]+", answer):
        return None
    if leaf.startswith("_") or entry.name.startswith(UNASKED):
        return None
    if not answer.endswith((".", "!", "?", "```")):
        answer += "."
    if entry.kind == "module":
        if not answer.startswith(("The ", "This ", "A ")):
            answer = f"`{entry.name}` is a module of Python's standard library. {answer}"
    elif not answer.startswith((leaf, entry.name)):
        what = {"class": "a class", "function": "a function", "method": "a method"}[entry.kind]
        call = f"`{entry.name}{entry.signature}`" if len(entry.signature) < 80 else f"`{entry.name}`"
        answer = f"{call} is {what}. {answer}" if rng.random() < 0.5 else f"{call}: {answer}"
    question = rng.choice(QUESTIONS[entry.kind]).format(name=entry.name)
    if rng.random() < 0.1:
        question = question[0].lower() + question[1:].rstrip(".?")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def topic_turn(text: str, rng: random.Random) -> Chat | None:
    heading, _, body = text.partition("\n")
    title = heading.lstrip("# ").replace('"', "`")
    body = re.sub(r"\n\s+[\w-]+ +::=.*(\n\s{5,}.*)*", "\n", body)  # grammar productions
    prose = [p for p in re.split(r"\n\s*\n", body.strip()) if re.match(r"[A-Z\"]", p)]
    answer = reflow("\n\n".join(prose), limit=900).replace('"', "`")
    if len(answer) < 60 or not heading.startswith("#"):
        return None
    title = title[0].lower() + title[1:] if title.startswith("The ") else title
    question = rng.choice(("Explain {}.", "Tell me about {}.", "How does {} work?")).format(title)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def small_talk(rng: random.Random) -> Chat:
    if rng.random() < 0.3:
        question = rng.choice(OFF_TOPIC_PROMPTS)
        answer = rng.choice(OFF_TOPIC_REPLIES)
    elif rng.random() < 0.15:
        name = rng.choice(("Ada", "Alan", "Grace", "Guido", "Linus", "Barbara"))
        question = rng.choice(("Give me a JSON object with a name and an age.", "Describe a person in JSON."))
        answer = json.dumps({"name": name, "age": rng.randint(18, 90)})
    elif rng.random() < 0.1:
        last = rng.randint(3, 12)
        question = rng.choice(("Count to {}.", "Count from 1 to {}.")).format(last)
        answer = ", ".join(map(str, range(1, last + 1)))
    else:
        questions, answers = rng.choice(SMALL_TALK)
        question, answer = rng.choice(questions), rng.choice(answers)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def conversations(turns: list[Chat], rng: random.Random) -> list[str]:
    """Shuffle turns into conversations of one to three turns, some of them under a system prompt."""
    extra = int(len(turns) * SMALL_TALK_SHARE / (1 - SMALL_TALK_SHARE))
    turns = turns + [small_talk(rng) for _ in range(extra)]
    rng.shuffle(turns)
    rendered = []
    while turns:
        messages: Chat = []
        if rng.random() < 0.2:
            messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        for _ in range(min(len(turns), rng.choice((1, 1, 1, 2, 3)))):
            messages += turns.pop()
        rendered.append(render_chat(messages))
    return rendered


# ------------------------------------------------------------------------------------ both splits


def build(seed: int = 0) -> tuple[Corpus, Corpus]:
    """The training and the validation corpus."""
    rng = random.Random(seed)
    splits = (Corpus(), Corpus())
    turns: tuple[list[Chat], list[Chat]] = ([], [])

    def add_module(module: str, entries: list[Entry]) -> None:
        side = is_validation(module)
        if sum(len(entry.doc) for entry in entries) > 40:
            splits[side].reference.append(reference_page(module, entries))
        for entry in entries:
            # What people ask a demo about first is asked here in several ways.
            times = 3 if entry.kind == "module" or module == "builtins" else 1
            turns[side].extend(turn for _ in range(times) if (turn := entry_turn(entry, rng)))

    for path in library_files("*.py"):
        module = public_name(module_name(path))
        try:
            text = path.read_text(encoding="utf-8")
            entries = source_entries(module, text)
        except (UnicodeDecodeError, SyntaxError):  # lib2to3 and others keep broken files on purpose
            continue
        splits[is_validation(module)].source.append(text)
        add_module(module, entries)
    for module in compiled_modules():
        add_module(public_name(module), compiled_entries(module))
    for name, text in topics():
        side = is_validation(f"topic {name}")
        splits[side].reference.append(text)
        if turn := topic_turn(text, rng):
            turns[side].append(turn)
    for path in [*library_files("*.txt"), *library_files("*.rst")]:
        splits[is_validation(path.name)].reference.append(path.read_text(encoding="utf-8", errors="ignore"))
    for split, side_turns in zip(splits, turns, strict=True):
        split.chat = conversations(side_turns, rng)
    return splits


if __name__ == "__main__":
    for label, split in zip(("training", "validation"), build(), strict=True):
        print(label, {kind: len(texts) for kind, texts in vars(split).items()}, split.characters())
