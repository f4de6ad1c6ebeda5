"""Files on disk -> pools: classes of pictures, parts to inspect, or plain questions. One file a kind of source.

A new kind needs a reader here, its options in ``recipe/sources.py``, and a line in :func:`open_reader`.
"""

from __future__ import annotations

from pathlib import Path
from typing import assert_never, overload

from lcl_adapter.amounts import memory_bytes
from lcl_adapter.data.sources.base import (
    ClassPool,
    Dialogue,
    Exchange,
    Fault,
    InspectionPool,
    Part,
    Picture,
    PictureClass,
    Pool,
    QuestionPool,
    Region,
    Specimen,
)
from lcl_adapter.data.sources.class_folder import read_class_folders
from lcl_adapter.data.sources.hugging_face import read_hf_classes, read_hf_questions
from lcl_adapter.data.sources.imagenet_lcl import read_test_pairs, read_train_pairs
from lcl_adapter.data.sources.images import read as read_image
from lcl_adapter.data.sources.inspection import read_mvtec, read_visa
from lcl_adapter.data.sources.isekai import read_isekai, read_isekai_questions
from lcl_adapter.data.sources.llava_json import read_llava_json
from lcl_adapter.data.sources.manifest import read_manifest
from lcl_adapter.data.sources.pocket import read_pocket
from lcl_adapter.data.sources.shards import read_shards
from lcl_adapter.data.sources.shikra import read_shikra, read_shikra_classes
from lcl_adapter.data.sources.vqa import read_llava_questions, read_pope, read_vqav2
from lcl_adapter.recipe import packaged
from lcl_adapter.recipe.sources import (
    AnyReader,
    ClassFolders,
    ClassReader,
    HfClasses,
    HfQuestions,
    ImageNetLcl,
    Isekai,
    LlavaJson,
    LlavaQuestions,
    Manifest,
    Mvtec,
    PartReader,
    PocketClasses,
    Pope,
    QuestionReader,
    Shards,
    Shikra,
    ShikraBoxes,
    Visa,
    VqaV2,
)

__all__ = [
    "ClassPool",
    "Dialogue",
    "Exchange",
    "Fault",
    "InspectionPool",
    "Part",
    "Picture",
    "PictureClass",
    "Pool",
    "QuestionPool",
    "Region",
    "Specimen",
    "open_reader",
    "read_class_folders",
    "read_image",
    "read_isekai_questions",
    "read_llava_json",
    "read_pocket",
    "read_test_pairs",
]


@overload
def open_reader(name: str, reader: ClassReader, min_pictures: int = 1) -> ClassPool: ...
@overload
def open_reader(name: str, reader: PartReader, min_pictures: int = 1) -> InspectionPool: ...
@overload
def open_reader(name: str, reader: QuestionReader, min_pictures: int = 1) -> QuestionPool: ...
def open_reader(name: str, reader: AnyReader, min_pictures: int = 1) -> Pool:
    """Read a recipe's source or suite. Paths in it are absolute by now (``recipe.load`` resolves them), or ``pocket:NAME``.

    ``min_pictures`` is how many pictures a class needs: the most shots, and one for the query.
    """
    reader = reader.model_copy(update={k: packaged(v) for k in type(reader).model_fields if isinstance(v := getattr(reader, k), Path)})
    fault = getattr(reader, "on_fault", "refuse")
    match reader:
        case PocketClasses():
            return read_pocket(reader.split, name, min_pictures)
        case ClassFolders():
            return read_class_folders(reader.path, name, min_pictures, reader.split, reader.hold_out, fault)
        case Manifest():
            listed = {str(k): v for k, v in reader.columns.items()}
            where = {k: str(v) for k, v in reader.where.items()}
            return read_manifest(reader.file, reader.images, listed, name, min_pictures, reader.split, reader.hold_out, fault, where, reader.lookup)
        case ImageNetLcl():
            return read_train_pairs(reader.pairs, reader.images, name, fault, min_pictures)
        case Isekai():
            return read_isekai(reader.file, reader.images, name, fault, min_pictures)
        case ShikraBoxes():
            return read_shikra_classes(reader.file, reader.images, name, fault, min_pictures)
        case HfClasses():
            columns = {str(k): v for k, v in reader.columns.items()}
            return read_hf_classes(reader.path, columns, name, min_pictures, reader.split, reader.hold_out, fault)
        case Mvtec():
            return read_mvtec(reader.path, name, reader.split, reader.held_out, reader.hold_out, fault)
        case Visa():
            return read_visa(reader.path, name, reader.split, reader.held_out, reader.hold_out, fault)
        case LlavaJson():
            return read_llava_json(reader.file, reader.images, name, fault, reader.limit)
        case LlavaQuestions():
            return read_llava_questions(reader.file, reader.answers, reader.images, name, fault, reader.limit, tuple(reader.closed))
        case VqaV2():
            return read_vqav2(reader.questions, reader.annotations, reader.images, name, fault, reader.limit, reader.image_name)
        case Pope():
            return read_pope(reader.file, reader.images, name, fault, reader.limit)
        case Shikra():
            return read_shikra(reader.file, reader.images, reader.kind, name, fault, reader.limit, reader.templates)
        case HfQuestions():
            columns = {str(k): v for k, v in reader.columns.items()}
            return read_hf_questions(reader.path, columns, name, fault, reader.limit)
        case Shards():
            keep = memory_bytes(reader.keep)
            return read_shards(reader.path, reader.urls, reader.index, reader.cache, keep, reader.mixed, name, reader.limit)
        case _:
            assert_never(reader)
