"""Asking a server: this project's own, vLLM, ``transformers serve``, or any other that speaks OpenAI's chat API."""

from lcl_adapter.client.endpoint import Endpoint, Spoken
from lcl_adapter.client.remote import RemotePredictor, judge

__all__ = ["Endpoint", "RemotePredictor", "Spoken", "judge"]
