"""The command `memserve` and `python -m memserve`. Ctrl-C is no error, from the first moment on."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point. Does not return."""
    try:
        from memserve.cli import main as run
    except KeyboardInterrupt:  # to define all options takes a while
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
