"""The two layouts that people have LLaVA in, told apart by the folder itself, and one way to read and write either."""

from lcl_adapter.base.layouts.checkpoint import Checkpoint, Layout, find_base, layout_of, open_checkpoint, read_config
from lcl_adapter.base.layouts.writing import Writing, check_folder_name

__all__ = ["Checkpoint", "Layout", "Writing", "check_folder_name", "find_base", "layout_of", "open_checkpoint", "read_config"]
