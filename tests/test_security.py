"""Properties of the source as a whole (DESIGN invariants 6 and 7)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "memserve"
SOURCES = sorted(PACKAGE.rglob("*.py"))

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "multiprocessing"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {("torch", "load"), ("torch", "save"), ("numpy", "load"), ("np", "load")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported = {alias.name.split(".")[0] for alias in node.names}
            assert not imported & FORBIDDEN_MODULES
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in FORBIDDEN_MODULES
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in FORBIDDEN_ATTRIBUTES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_point_down(path: Path) -> None:
    allowed = {
        "router": {"router"},
        "workers": {"workers", "models", "kernels", "pool"},
        "models": {"models", "kernels"},
        "kernels": {"kernels"},
        "pool": {"pool"},
        "bench": {"bench", "pool"},
        "simulate": {"simulate", "bench", "router", "workers", "pool"},
        "top": {"top", "bench"},
        "doctor": {"doctor", "router", "bench", "models", "kernels", "pool"},
    }
    layer = path.relative_to(PACKAGE).parts[0]
    above = {"cli.py": set(allowed) | {"cli"}, "__main__.py": {"cli"}}
    known = allowed.get(layer, above.get(layer, set()))  # a leaf knows leaves alone
    for module in _imported(path):
        top = module.removeprefix("memserve.").split(".")[0]
        assert top not in (*allowed, "cli") or top in known, f"{layer} imports {module}"


def _imported(path: Path) -> set[str]:
    """Modules of this package that a file imports, at its top or later; nothing is imported relatively."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            # `from memserve import x` and `from memserve.x import y` alike
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("memserve.")}


def test_the_router_never_imports_torch() -> None:
    modules = [
        "memserve." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in SOURCES
        if path.relative_to(PACKAGE).parts[0] in ("router", "top", "cli.py", "memfd.py", "messages")
    ]
    code = f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name)\n"
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
