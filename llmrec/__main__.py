"""``llmrec`` and ``python -m llmrec``: the command line, interruptible from its first moment."""

import sys

INTERRUPTED = 130
"""As in `llmrec.console`, whose import may be what is interrupted."""


def main() -> None:
    """Entry point of the installed command."""
    try:
        from llmrec.cli import main as command

        command()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
