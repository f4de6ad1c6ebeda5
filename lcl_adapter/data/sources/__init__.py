"""Files on disk -> pools: classes of pictures, parts to inspect, or plain questions. One file for each kind of source.

A new source is one file here and one line in ``READERS``. The file has a class of options (a ``ClassReader``,
``PartReader`` or ``QuestionReader`` with a ``type`` of its own) whose method ``open`` reads the files.
"""

from __future__ import annotations

from pathlib import Path
from typing import overload

from lcl_adapter.data.sources.base import (
    ClassPool,
    Dialogue,
    Exchange,
    Fault,
    InspectionPool,
    PartCategory,
    PictureClass,
    Pool,
    QuestionPool,
    Region,
    Specimen,
)
from lcl_adapter.data.sources.class_folder import ClassFolders, read_class_folders
from lcl_adapter.data.sources.depth import with_white
from lcl_adapter.data.sources.hugging_face import HfClasses, HfQuestions
from lcl_adapter.data.sources.imagenet_lcl import ImageNetLcl, read_test_pairs
from lcl_adapter.data.sources.images import fault_of
from lcl_adapter.data.sources.images import read as read_image
from lcl_adapter.data.sources.isekai import Isekai, read_isekai_questions
from lcl_adapter.data.sources.llava_json import LlavaJson, read_llava_json
from lcl_adapter.data.sources.manifest import Manifest
from lcl_adapter.data.sources.mvtec import Mvtec
from lcl_adapter.data.sources.open_mi import read_open_mi
from lcl_adapter.data.sources.picture import Picture
from lcl_adapter.data.sources.pocket import PocketClasses, read_pocket
from lcl_adapter.data.sources.self_replay import SelfReplay
from lcl_adapter.data.sources.shards import Shards
from lcl_adapter.data.sources.shikra import Shikra, ShikraBoxes
from lcl_adapter.data.sources.visa import Visa
from lcl_adapter.data.sources.vqa import LlavaQuestions, Pope, VqaV2
from lcl_adapter.packaged import packaged
from lcl_adapter.recipe.schema import register_sources
from lcl_adapter.recipe.sources import ClassReader, PartReader, QuestionReader, Reader

__all__ = [
    "READERS",
    "ClassPool",
    "Dialogue",
    "Exchange",
    "Fault",
    "InspectionPool",
    "Isekai",
    "PartCategory",
    "Picture",
    "PictureClass",
    "Pool",
    "QuestionPool",
    "Region",
    "Specimen",
    "fault_of",
    "open_reader",
    "read_class_folders",
    "read_image",
    "read_isekai_questions",
    "read_llava_json",
    "read_open_mi",
    "read_pocket",
    "read_test_pairs",
]

READERS: tuple[type[Reader], ...] = (
    PocketClasses,
    ClassFolders,
    Manifest,
    ImageNetLcl,
    Isekai,
    ShikraBoxes,
    HfClasses,
    Mvtec,
    Visa,
    LlavaJson,
    LlavaQuestions,
    VqaV2,
    Pope,
    Shikra,
    HfQuestions,
    Shards,
    SelfReplay,
)
register_sources(READERS)


@overload
def open_reader(name: str, reader: ClassReader, min_pictures: int = 1) -> ClassPool: ...
@overload
def open_reader(name: str, reader: PartReader, min_pictures: int = 1) -> InspectionPool: ...
@overload
def open_reader(name: str, reader: QuestionReader, min_pictures: int = 1) -> QuestionPool: ...
@overload
def open_reader(name: str, reader: Reader, min_pictures: int = 1) -> Pool: ...
def open_reader(name: str, reader: Reader, min_pictures: int = 1) -> Pool:
    """Read the pool of a recipe's source or suite.

    Its paths are absolute (``recipe.load`` resolves them), or ``pocket:NAME``.

    min_pictures: how many pictures a class needs: the largest number of shots, and one for the query.
    """
    paths = {key: packaged(value) for key in type(reader).model_fields if isinstance(value := getattr(reader, key), Path)}
    pool: Pool = reader.model_copy(update=paths).open(name, min_pictures)
    return pool if getattr(reader, "shipped", False) else with_white(pool, getattr(reader, "white", None))
