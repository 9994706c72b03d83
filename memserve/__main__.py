"""`python -m memserve` is the command `memserve`."""

from memserve.cli import main

if __name__ == "__main__":
    main()
