"""The examples run, as a reader would run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_two_processes_share_a_prefix() -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "mempool.py"], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "b: pulled 13.1 MB, found 1600 tokens" in done.stdout
