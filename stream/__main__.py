"""The command `icestream`, also as `python -m stream`."""

from __future__ import annotations

from stream.huge_pages import ask_for_huge_pages


def main() -> None:
    """Ask for large pages, which may start the program again, then run the command line."""
    ask_for_huge_pages()
    from stream.cli import main as run

    run()


if __name__ == "__main__":
    main()
