"""The two layouts that LLaVA checkpoints come in: recognised by the folder itself, and read and written here."""

from lcl_adapter.base.layouts.checkpoint import Checkpoint, Layout, find_base, layout_of, open_checkpoint, read_config
from lcl_adapter.base.layouts.writing import CheckpointWriter, check_folder_name

__all__ = ["Checkpoint", "CheckpointWriter", "Layout", "check_folder_name", "find_base", "layout_of", "open_checkpoint", "read_config"]
