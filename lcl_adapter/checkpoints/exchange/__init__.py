"""Exchange adapters and models: export to upstream LLaVA, vLLM and llama.cpp, import from upstream LLaVA and from plain PEFT."""

from lcl_adapter.checkpoints.exchange.exporting import export_adapter
from lcl_adapter.checkpoints.exchange.for_llama_cpp import export_for_llama_cpp
from lcl_adapter.checkpoints.exchange.for_vllm import export_for_vllm
from lcl_adapter.checkpoints.exchange.importing import import_adapter

__all__ = ["export_adapter", "export_for_llama_cpp", "export_for_vllm", "import_adapter"]
