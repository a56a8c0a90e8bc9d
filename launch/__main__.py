"""`python -m launch` is `dinoreg-launch`."""

from launch.cli import main

if __name__ == "__main__":
    main()
