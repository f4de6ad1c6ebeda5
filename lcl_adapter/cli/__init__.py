"""The command line: each command calls one function of the package.

Heavy imports are inside the commands, so that --help is instant.
"""

from lcl_adapter.cli import checkpoints, serving, training
from lcl_adapter.cli.common import main

__all__ = ["checkpoints", "main", "serving", "training"]
