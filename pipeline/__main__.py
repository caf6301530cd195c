"""`python -m pipeline` runs `alexstream`."""

from pipeline.cli import main

if __name__ == "__main__":
    main(prog_name="alexstream")
