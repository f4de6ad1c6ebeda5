"""The validation suites of a recipe that have enough classes: with few classes of one's own, a share of them may be none."""

from __future__ import annotations

from lcl_adapter.data.sources import ClassPool, open_reader
from lcl_adapter.data.sources.held_out import HeldOut, in_split
from lcl_adapter.data.sources.parts import EmptySplitError
from lcl_adapter.errors import DataError
from lcl_adapter.recipe import Recipe
from lcl_adapter.recipe.suites import InspectionSuite, LclSuite, ProductSuite, SuiteOptions


def with_enough_classes(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe without those validation suites whose split has fewer classes than an episode needs, and a note about each of them."""
    short = {name: missing for name, options in recipe.evaluate.validation.items() if (missing := _missing(options))}
    if not short:
        return recipe, []
    enough = {name: options for name, options in recipe.evaluate.validation.items() if name not in short}
    notes = [f"evaluate.validation.{name}: left out, so it gives a judgement no weights: {missing}" for name, missing in short.items()]
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"validation": enough})}), notes


def _missing(options: SuiteOptions) -> str | None:
    """What a suite on ``split: validation`` lacks; None where it has enough classes, or cannot be read, which is reported with its error."""
    source = getattr(options, "source", None)
    if not isinstance(source, HeldOut) or source.split != "validation":
        return None
    try:
        if isinstance(options, InspectionSuite):
            open_reader("", source)
        elif isinstance(options, LclSuite | ProductSuite):
            return _missing_classes(options, source)
    except EmptySplitError as error:
        return str(error)
    except DataError:
        pass
    return None


def _missing_classes(options: LclSuite | ProductSuite, source: HeldOut) -> str | None:
    needed = options.ways if isinstance(options, LclSuite) else 3  # two products, and one that is neither
    pool = open_reader("", source.model_copy(update={"split": "all"}), 1 + max(options.shots))
    assert isinstance(pool, ClassPool)
    own = [one for one in pool.classes if in_split(one.name, "validation", source.hold_out, source.validation)]
    if len(own) >= needed:
        return None
    of_all = f"{len(own)} of {len(pool)} classes {'falls' if len(own) == 1 else 'fall'} into `split: validation`, and an episode needs {needed}"
    return f"{of_all}; add classes, or raise `validation` in training and evaluation"
