"""`python -m experiments` is `learned-rl`."""

from experiments.cli import main

if __name__ == "__main__":
    main()
