"""``python -m lcl_adapter.cli``."""

from lcl_adapter.cli import main

main()
