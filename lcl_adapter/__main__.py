"""``python -m lcl_adapter``: the command line, as ``lcl-adapter``."""

from lcl_adapter.cli import main

if __name__ == "__main__":
    main(prog_name="lcl-adapter")
