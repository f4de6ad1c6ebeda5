"""Asking a server: this project's own, vLLM, ``transformers serve``, or any other that speaks OpenAI's chat API."""

from lcl_adapter.answering.client.endpoint import Endpoint, Spoken
from lcl_adapter.answering.client.remote import RemotePredictor, judge

__all__ = ["Endpoint", "RemotePredictor", "Spoken", "judge"]
