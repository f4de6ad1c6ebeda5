"""Who is compared: a base on this machine without and with its adapter, or two models of a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lcl_adapter.answering.client import Endpoint, RemotePredictor
from lcl_adapter.answering.predict import Predictor, Reply, Request
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.errors import MissingError


class Asks(Protocol):
    """Requests -> replies, in their order."""

    def __call__(self, requests: Sequence[Request], *, done: Callable[[int], None] | None = None, new_tokens: int | None = None) -> list[Reply]: ...


@dataclass(frozen=True)
class ModelPair:
    """What is compared. vision: the base's tower for the baselines, None where it is not at hand. told: what kept figures depend on."""

    base: Asks
    adapter: Asks
    vision: VisionFeatures | None
    told: Any = ""

    @classmethod
    def of(cls, predictor: Predictor, told: Any = "") -> ModelPair:
        """A base on this machine, without its adapter and with it."""

        def without(requests: Sequence[Request], *, done: Callable[[int], None] | None = None, new_tokens: int | None = None) -> list[Reply]:
            with predictor.base.without_adapter():
                return predictor.run(requests, done=done, new_tokens=new_tokens)

        return cls(without, predictor.run, predictor.vision, told)

    @classmethod
    def behind(cls, endpoint: Endpoint, base: str, adapter: str, workers: int, pad: bool = False) -> ModelPair:
        """Two models of a server, by their names there."""
        one, other = (RemotePredictor(endpoint, name, workers, pad=pad) for name in (base, adapter))
        return cls(one.run, other.run, None, [endpoint.url, base, adapter, *(["padded"] if pad else [])])


@dataclass(frozen=True)
class ServedModels:
    """Where the models are served, and under which names; ``adapter`` None: the server's only other model, or the run's own name."""

    url: str
    adapter: str | None = None
    base: str = "base"
    workers: int = 8
    pad: bool = False

    @contextmanager
    def pair(self, run: Path) -> Iterator[ModelPair]:
        """As long as the endpoint is open. Raises EndpointError, MissingError."""
        with Endpoint(self.url) as endpoint:
            base = endpoint.model(self.base, "--base-model")
            adapter = self.adapter
            if adapter is None:
                others = [name for name in endpoint.models() if name != base]
                if not others:
                    raise MissingError(f"{endpoint.url} serves {base} alone; load the adapter there, or name it with --model.")
                adapter = run.name if run.name in others else others[0] if len(others) == 1 else None
            yield ModelPair.behind(endpoint, base, endpoint.model(adapter), self.workers, self.pad)
