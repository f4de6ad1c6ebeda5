"""A client for this project's server, vLLM, ``transformers serve``, and any other server with OpenAI's chat API."""

from lcl_adapter.answering.client.decisions import ScoreSource
from lcl_adapter.answering.client.endpoint import ChatAnswer, Endpoint
from lcl_adapter.answering.client.remote import RemotePredictor, judge

__all__ = ["ChatAnswer", "Endpoint", "RemotePredictor", "ScoreSource", "judge"]
