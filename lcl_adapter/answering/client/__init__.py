"""Asking a server: this project's own, vLLM, ``transformers serve``, or any other that speaks OpenAI's chat API."""

from lcl_adapter.answering.client.endpoint import ChatAnswer, Endpoint
from lcl_adapter.answering.client.remote import RemotePredictor, judge

__all__ = ["ChatAnswer", "Endpoint", "RemotePredictor", "judge"]
