"""Adapters to and from upstream LLaVA: what is trained here runs there, what was trained there runs here."""

from lcl_adapter.exchange.exporting import export_adapter
from lcl_adapter.exchange.importing import import_adapter

__all__ = ["export_adapter", "import_adapter"]
