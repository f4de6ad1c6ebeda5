"""From files to conversations: sources, episodes, the mixture.

Importing this package registers every source with the recipe's schema.
"""

from lcl_adapter.data.sources import READERS
from lcl_adapter.recipe import Recipe, load

__all__ = ["READERS", "Recipe", "load"]
