"""Everything this package raises on purpose. Each message says what is wrong, where, and what to do.

LclError
├── UserError            the caller can mend it: the command line prints it and exits with 2
│   ├── RecipeError      one or more faults of a recipe, all together
│   ├── DataError        files, images, records, classes
│   ├── EpisodeError     an episode that cannot be drawn, or does not fit the context
│   ├── ModelError       a base that is missing, unknown or no LLaVA
│   ├── AdapterError     an adapter that does not belong to this base, or is incomplete
│   ├── RunError         a run folder that exists, is incomplete, or cannot be written
│   ├── EndpointError    a server that cannot be reached, refuses the key, or does not speak the API
│   ├── RequestError     a request to the server that cannot be answered as it stands
│   ├── MissingError     a support set, version or model that is not there
│   └── ConflictError    a support set that another has written since
└── MergeError           a merged model that does not answer as the adapter did
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


class LclError(Exception):
    """Base of every error raised on purpose."""


class UserError(LclError):
    """Something that the caller can mend."""


class RecipeError(UserError):
    """All faults of a recipe at once. ``faults`` holds one line each, with file and line where they are known."""

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        count = f"{len(self.faults)} faults" if len(self.faults) > 1 else "1 fault"
        super().__init__("\n".join([f"the recipe has {count}:", *(f"  {fault}" for fault in self.faults)]))


class DataError(UserError):
    """A file, image, record or class that cannot be used."""


class EpisodeError(UserError):
    """An episode that cannot be drawn as asked, or does not fit the model's context."""


class ModelError(UserError):
    """A base that is missing, of an unknown family, or no LLaVA at all."""


class AdapterError(UserError):
    """An adapter that is incomplete or was trained on another base."""


class RunError(UserError):
    """A run folder that exists already, is incomplete, or cannot be written."""


class EndpointError(UserError):
    """A server that cannot be reached, refuses the key, or does not speak OpenAI's API."""


class RequestError(UserError):
    """A request to the server that cannot be answered as it stands."""


class MissingError(UserError):
    """A support set, a version of one, or a model that the server does not have."""


class ConflictError(UserError):
    """A support set that another has written since it was read."""


class MergeError(LclError):
    """A merged model whose answers differ from the adapter's."""


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`` (did you mean 'x'?)``, or nothing where no known word is near."""
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""
