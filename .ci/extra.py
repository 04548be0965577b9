"""Prints the packages of extras in pyproject.toml, which pip installs only with fastseq itself."""

import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # before Python 3.11: pip's own copy
    from pip._vendor import tomli as tomllib


def main() -> None:
    """Print the requirements of the extras named on the command line, one a line."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    for name in sys.argv[1:]:
        if name not in extras:
            raise SystemExit(f"pyproject.toml has no extra {name!r}; it has {', '.join(extras)}")
        print(*extras[name], sep="\n")


main()
