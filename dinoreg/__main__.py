"""`python -m dinoreg`, which is also how torchrun starts it: `torchrun --nproc-per-node 8 -m dinoreg train ...`."""

from dinoreg.cli import main

if __name__ == "__main__":
    main()
