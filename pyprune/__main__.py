"""``python -m pyprune`` is the command ``pyprune``."""

from pyprune.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
