"""Files on disk -> pools: classes of pictures, or plain questions. One file a kind of source.

A new kind needs a reader here, its options in ``recipe/schema.py``, and a line in :func:`open_source`.
"""

from __future__ import annotations

from typing import assert_never

from lcl_adapter.recipe.schema import ClassFolderSource, LlavaJsonSource, PocketSource, SourceOptions
from lcl_adapter.sources.base import ClassPool, Dialogue, Exchange, Picture, PictureClass, Pool, QuestionPool
from lcl_adapter.sources.class_folder import read_class_folders
from lcl_adapter.sources.images import read as read_image
from lcl_adapter.sources.llava_json import read_llava_json
from lcl_adapter.sources.pocket import read_pocket

__all__ = [
    "ClassPool",
    "Dialogue",
    "Exchange",
    "Picture",
    "PictureClass",
    "Pool",
    "QuestionPool",
    "open_source",
    "read_class_folders",
    "read_image",
    "read_llava_json",
    "read_pocket",
]


def open_source(name: str, options: SourceOptions, min_pictures: int = 1) -> Pool:
    """Read a recipe's source. Paths in ``options`` are absolute by now (``recipe.load`` resolves them).

    ``min_pictures`` is how many pictures a class needs: the most shots, and one for the query.
    """
    match options:
        case PocketSource():
            return read_pocket(options.split, name, min_pictures)
        case ClassFolderSource():
            return read_class_folders(options.path, name, min_pictures, options.split, options.hold_out)
        case LlavaJsonSource():
            return read_llava_json(options.file, options.images, name, options.on_fault, options.limit)
        case _:
            assert_never(options)
