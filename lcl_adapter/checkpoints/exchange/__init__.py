"""Exchange adapters: export to upstream LLaVA and to vLLM, import from upstream LLaVA and from plain PEFT."""

from lcl_adapter.checkpoints.exchange.exporting import export_adapter
from lcl_adapter.checkpoints.exchange.for_vllm import export_for_vllm
from lcl_adapter.checkpoints.exchange.importing import import_adapter

__all__ = ["export_adapter", "export_for_vllm", "import_adapter"]
