"""The command ``pyprune``, as ``python -m pyprune`` too."""

from __future__ import annotations


def main() -> int:
    """Run the command line. An interrupt ends it in one line also while what it needs is still being imported."""
    try:
        from pyprune.cli.main import main as run
    except KeyboardInterrupt:
        import sys

        print("error: interrupted", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    raise SystemExit(main())
