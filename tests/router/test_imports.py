"""The router process stays light: torch is for workers."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import memserve.router


def test_the_router_never_imports_torch() -> None:
    names = [module.name for module in pkgutil.walk_packages(memserve.router.__path__, "memserve.router.")]
    assert {"memserve.router.http.server", "memserve.router.scheduling.policies.policies"} <= set(names)
    script = "\n".join(
        [
            "import importlib, sys",
            f"for name in {names!r}:",
            "    importlib.import_module(name)",
            "    assert 'torch' not in sys.modules, name",
        ]
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
