"""A stored set with its images as JSON, in pieces.

A set may have 90 MB. In pieces it is read from the disk as fast as its client reads it, so that an answer that nobody reads
holds neither memory nor the interpreter.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator

from lcl_adapter.answering import api_types
from lcl_adapter.answering.sent_images import data_url_head
from lcl_adapter.serve.store import Store, StoredSet

PIECE = 3 * 2**16  # bytes of an image file at a time; three of them are four characters


def pieces_of(store: Store, stored: StoredSet, summary: api_types.SupportSetOut) -> Iterator[bytes]:
    """:class:`lcl_adapter.answering.api_types.SupportSetWithExamples` as JSON; the images are data URLs.

    Raises RunError, at the first piece if an image cannot be read by then.
    """
    for example in stored.examples:
        store.open_image(stored.namespace, example.image).close()
    yield summary.model_dump_json().removesuffix("}").encode() + b', "examples": ['
    for number, example in enumerate(stored.examples):
        fields = api_types.StoredExample(label=example.label, sha256=example.image).model_dump_json(exclude={"image"})
        with store.open_image(stored.namespace, example.image) as opened:
            data = opened.read(PIECE)
            head = data_url_head(data)
            yield (", " if number else "").encode() + f'{fields.removesuffix("}")}, "image": "{head}'.encode()
            while data:
                yield base64.b64encode(data)
                data = opened.read(PIECE)
        yield b'"}'
    yield b"]}"
