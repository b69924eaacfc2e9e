"""`python -m experiments` is `learned-rl`."""

import sys


def main() -> None:
    """Entry point of `learned-rl`. Ctrl-C while libraries are imported, which takes seconds, is no traceback either."""
    try:
        from experiments.cli import main as run
    except KeyboardInterrupt:
        print("learned-rl: interrupted.", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
