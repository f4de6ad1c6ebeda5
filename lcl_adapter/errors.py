"""Every error that this package raises on purpose. Each message says what is wrong, where, and what to do.

LclError
├── UserError            the caller can fix it: the command line prints it and exits with 2
│   ├── RecipeError      one or more faults of a recipe, reported together
│   ├── DataError        files, images, records, classes
│   ├── EpisodeError     an episode that cannot be drawn or does not fit the context
│   ├── ModelError       a base that is missing, broken or no LLaVA
│   ├── AdapterError     an adapter that is incomplete or belongs to another base
│   ├── RunError         a run folder that exists, is incomplete, or cannot be written
│   ├── EndpointError    a server that cannot be reached, refuses the key, or does not speak the API
│   ├── RequestError     an invalid request to the server
│   ├── MissingError     a support set, version or model that does not exist
│   └── ConflictError    a support set that another client has changed since it was read
└── MergeError           a merged model whose answers differ from the adapter's
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


class LclError(Exception):
    """The base class of every error of this package."""


class UserError(LclError):
    """An error that the caller can fix."""


class RecipeError(UserError):
    """All faults of a recipe. ``faults`` has one line for each, with file and line number where they are known."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        count = f"{len(self.faults)} faults" if len(self.faults) > 1 else "1 fault"
        super().__init__("\n".join([f"the recipe has {count}:", *(f"  {fault}" for fault in self.faults)]))

    def __reduce__(self) -> tuple[type[RecipeError], tuple[tuple[str, ...]]]:
        """By its faults: an error of one training process is sent to the others."""
        return type(self), (self.faults,)


class DataError(UserError):
    """A file, image, record or class that cannot be used."""


class EpisodeError(UserError):
    """An episode that cannot be drawn with its options, or does not fit the model's context."""


class ModelError(UserError):
    """A base that is missing, broken, of an unknown family, or no LLaVA."""


class AdapterError(UserError):
    """An adapter that is incomplete or was trained on another base."""


class RunError(UserError):
    """A run folder that exists already, is incomplete, or cannot be written."""


class EndpointError(UserError):
    """A server that cannot be reached, refuses the key, or does not speak OpenAI's API."""


class RequestError(UserError):
    """An invalid request to the server."""


class MissingError(UserError):
    """A support set, a version or a model that does not exist on the server."""


class ConflictError(UserError):
    """A support set that another client has changed since it was read."""


class MergeError(LclError):
    """A merged model whose answers differ from the adapter's."""


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`` (did you mean 'x'?)`` with the most similar known word; empty where none is similar."""
    matches = get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
