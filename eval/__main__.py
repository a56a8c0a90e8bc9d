"""`python -m eval` is `dinoreg-eval`."""

from eval.cli import main

if __name__ == "__main__":
    main()
