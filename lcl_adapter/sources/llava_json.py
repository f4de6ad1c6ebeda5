"""LLaVA's training JSON: ``[{"id", "image"?, "conversations": [{"from": "human"|"gpt", "value"}]}]``.

One ``<image>`` an image, in order; a lone ``<image>`` anywhere in its turn is moved to the front, as upstream does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lcl_adapter.errors import DataError
from lcl_adapter.sources.base import Dialogue, Exchange, Picture, QuestionPool

MARK = "<image>"


def read_llava_json(file: Path, images: Path, name: str = "", on_fault: str = "refuse", limit: int | None = None) -> QuestionPool:
    """Read the records; images are looked up under ``images``, a folder or a zip archive, and not opened.

    ``on_fault``: "refuse" raises one DataError that lists the first faults; "skip" leaves bad records out and counts
    them. ``limit`` takes the first records only.
    """
    records = _load(file)[:limit]
    archive = images.suffix.lower() == ".zip"
    dialogues, faults = [], []
    for number, record in enumerate(records, 1):
        origin = f"{file}: record {number}"
        if isinstance(record, dict) and "id" in record:
            origin += f" (id {record['id']!r})"
        try:
            dialogues.append(Dialogue(_exchanges(record, images, archive), origin))
        except ValueError as error:
            faults.append(f"{origin}: {error}")
        except KeyError as error:
            faults.append(f"{origin}: no key {error}")
        except (TypeError, AttributeError):
            faults.append(f'{origin}: not of the form {{"id", "image", "conversations": [{{"from", "value"}}]}}')
    if faults and on_fault == "refuse":
        more = f"\n  ... and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise DataError("\n  ".join([f"{len(faults)} bad records (mend them, or set `on_fault: skip`):", *faults[:10]]) + more)
    if not dialogues:
        raise DataError(f"{file}: no usable record in it.")
    return QuestionPool(name or file.stem, tuple(dialogues), {"bad record": len(faults)} if faults else {})


def _load(file: Path) -> list[Any]:
    try:
        loaded = json.loads(file.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(f"{file}: no such file.") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 (byte {error.start}: {error.reason}). Save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}: not JSON ({error.msg}).") from error
    if not isinstance(loaded, list):
        raise DataError(f'{file}: a list of records is expected ([{{"id", "image", "conversations"}}, ...]), this is a {type(loaded).__name__}.')
    return loaded


def _exchanges(record: dict[str, Any], images: Path, archive: bool) -> tuple[Exchange, ...]:
    named = record.get("image") or []
    paths = [named] if isinstance(named, str) else list(named)
    pictures = [Picture(images, p) if archive else Picture(images / p) for p in paths]
    turns = record["conversations"]
    if len(turns) < 2 or len(turns) % 2:
        raise ValueError(f"{len(turns)} turns; pairs of human and gpt are expected")
    exchanges, used = [], 0
    for human, gpt in zip(turns[::2], turns[1::2], strict=True):
        if human["from"] != "human" or gpt["from"] != "gpt":
            raise ValueError(f"turns must alternate human, gpt; here {human['from']!r}, {gpt['from']!r}")
        marks = human["value"].count(MARK)
        if marks > 1:
            raise ValueError("several <image> in one turn; an image a turn keeps their order")
        if used + marks > len(pictures):
            raise ValueError(f"more <image> than its {len(pictures)} images")
        picture = pictures[used] if marks else None
        used += marks
        if not gpt["value"].strip():
            raise ValueError("an empty answer: nothing to learn")
        exchanges.append(Exchange(human["value"].replace(MARK, "").strip(), gpt["value"].strip(), picture))
    if used < len(pictures):
        raise ValueError(f"{len(pictures)} images, {used} <image>")
    return tuple(exchanges)
