"""The command line: each command calls one function of the package.

Heavy imports are inside the commands, so that --help is instant.
"""

from lcl_adapter.cli import asking, bases, checkpoints, serving, training
from lcl_adapter.cli.common import main

__all__ = ["asking", "bases", "checkpoints", "main", "serving", "training"]
