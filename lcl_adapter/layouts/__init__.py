"""The two layouts that people have LLaVA in, told apart by the folder itself, and one way to read and write either."""

from lcl_adapter.layouts.checkpoint import Checkpoint, Layout, find_base, layout_of, open_checkpoint, read_config
from lcl_adapter.layouts.writing import Writing, tower_name

__all__ = ["Checkpoint", "Layout", "Writing", "find_base", "layout_of", "open_checkpoint", "read_config", "tower_name"]
