"""Recipes: one YAML file describes a whole run. ``schema`` has the keys, ``loading`` reads them.

The kinds of sources are in ``lcl_adapter.data.sources``, which must be imported before a recipe is read.
"""

from lcl_adapter.recipe.loading import load, save
from lcl_adapter.recipe.schema import Recipe
from lcl_adapter.recipe.shipped import copy_recipe, find_recipe, shipped_recipes
from lcl_adapter.recipe.suites import presets

__all__ = ["Recipe", "copy_recipe", "find_recipe", "load", "presets", "save", "shipped_recipes"]
