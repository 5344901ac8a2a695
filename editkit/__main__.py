"""`python -m editkit` and the `editkit` command."""

from __future__ import annotations

from editkit.cli.main import main

if __name__ == "__main__":
    main()
