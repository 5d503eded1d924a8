"""`python -m ibprune`."""

from ibprune.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
