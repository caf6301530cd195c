"""`python -m train` runs `alextrain`."""

from train.cli import main

if __name__ == "__main__":
    main(prog_name="alextrain")
