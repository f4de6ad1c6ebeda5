"""The two models that are compared: a base on this machine without and with its adapter, or two models of a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lcl_adapter.answering.client import Endpoint, RemotePredictor, ScoreSource
from lcl_adapter.answering.judgement import TowerEvidence, Weighing
from lcl_adapter.answering.predict import Predictor, Reply, Request
from lcl_adapter.base.tower_space import TowerSpace
from lcl_adapter.base.vision import VisionFeatures
from lcl_adapter.errors import MissingError


class Answerer(Protocol):
    """Requests -> replies, in their order."""

    def __call__(self, requests: Sequence[Request], *, done: Callable[[int], None] | None = None, new_tokens: int | None = None) -> list[Reply]: ...


@dataclass(frozen=True)
class ModelPair:
    """The base and the adapter, as functions that answer requests.

    vision: the base's tower for the baselines, None if a server holds the models. identity: which models these are, as
    JSON: the precision, the device and the support tokens of a base on this machine, or the names on a server. Cached
    figures depend on it.
    weighing, tower: of judgements by model and tower; None where no weights were fitted. notes: what a user should know
    about a server's answers; it grows with the requests.
    """

    base: Answerer
    adapter: Answerer
    vision: VisionFeatures | None
    identity: Any = ""
    weighing: Weighing | None = None
    tower: TowerEvidence | None = None
    notes: Sequence[str] = ()

    @classmethod
    def local(cls, predictor: Predictor, weighed: tuple[Weighing, TowerSpace] | None = None) -> ModelPair:
        """A base on this machine, without its adapter and with it. weighed: the adapter's weights, and where its tower's features are compared."""

        def without_adapter(requests: Sequence[Request], *, done: Callable[[int], None] | None = None, new_tokens: int | None = None) -> list[Reply]:
            with predictor.base.without_adapter():
                return predictor.run(requests, done=done, new_tokens=new_tokens)

        base = predictor.base
        identity: list[Any] = [base.precision, str(base.dtype), base.device.type, *base.support_reading]
        if weighed is None:
            return cls(without_adapter, predictor.run, predictor.vision, identity)
        weighing, space = weighed
        tower = TowerEvidence(predictor.vision, space, predictor.base.orientations)
        return cls(without_adapter, predictor.run, predictor.vision, [*identity, weighing.to_json(), space.hash()], weighing, tower)

    @classmethod
    def served(cls, endpoint: Endpoint, base: str, adapter: str, workers: int, pad: bool = False, scores: ScoreSource = "auto") -> ModelPair:
        """Two models of a server, by their names on it."""
        base_predictor, adapter_predictor = (RemotePredictor(endpoint, name, workers, pad=pad, scores=scores) for name in (base, adapter))
        return cls(base_predictor.run, adapter_predictor.run, None, [endpoint.url, base, adapter, *(["padded"] if pad else [])], notes=endpoint.notes)


@dataclass(frozen=True)
class ServedModels:
    """A server, and the names of the two models on it.

    adapter: None means the server's only model beside the base, or the one with the name of the run's folder.
    """

    url: str
    adapter: str | None = None
    base: str = "base"
    workers: int = 8
    pad: bool = False
    scores: ScoreSource = "auto"

    @contextmanager
    def connect(self, run: Path) -> Iterator[ModelPair]:
        """The pair, as long as the connection is open. Raises EndpointError, MissingError."""
        with Endpoint(self.url) as endpoint:
            base = endpoint.model(self.base, "--base-model")
            adapter = self.adapter
            if adapter is None:
                others = [name for name in endpoint.models() if name != base]
                if not others:
                    raise MissingError(f"{endpoint.url} serves only {base}; load the adapter on the server, or name it with --model.")
                adapter = run.name if run.name in others else others[0] if len(others) == 1 else None
            yield ModelPair.served(endpoint, base, endpoint.model(adapter), self.workers, self.pad, self.scores)
