"""`sedd`, and `python -m sedd_jax`. Ctrl-C is one line from the start, also while the program is loaded."""

import sys


def run() -> None:
    """Entry point of the console script."""
    try:
        from sedd_jax.cli import main as cli

        cli.run()
    except KeyboardInterrupt:
        print("sedd: interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        # After an interrupt in code that was made of text, as dataclasses make some, `python -m` would end by SIGINT,
        # whatever the status. Python forgets it with the next such code.
        exec("")


if __name__ == "__main__":
    run()
