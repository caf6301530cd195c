"""`python -m prep` runs `alexprep`."""

from prep.cli import main

if __name__ == "__main__":
    main(prog_name="alexprep")
