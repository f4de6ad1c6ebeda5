"""The one home of random streams: every numpy generator of the package is made here, from what it is for.

A stream is a pure function of its key, so it does not depend on workers, on processes or on a resume. Different keys
have independent streams. numpy's own seeding of lists does not promise this: it pads with zeros, so ``[7]`` and
``[7, 0]`` are one stream, and lists of two uses can be equal. Here the key is hashed first.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

import numpy as np

Purpose = Literal[
    "episode",  # one episode of a source or a suite
    "schedule",  # the sources of a block's rows
    "question order",  # the order of a source's dialogues in one pass
    "batch order",  # the order of batches of similar length
    "example order",  # the order of a support set whose examples a protocol fixes
    "control",  # what makes a control's support set uninformative
    "view",  # another view of a picture
    "interval",  # resampling for an interval
    "own answer",  # the tokens of a base's own answer, where they are drawn
    "compared",  # of training classes, those by which a tower's features are compared
    "support tokens",  # how many tokens the labelled pictures of a row have, of several numbers
]


def generator(purpose: Purpose, *key: str | int) -> np.random.Generator:
    """The generator of ``(purpose, *key)``.

    The number 1 and the text "1" are different, and so are ("a", "b") and ("ab",). Two keys have the same stream only
    if SHA-256 maps them to the same 128 bits.

    Raises TypeError for a part that is no text and no whole number.
    """
    wrong = [part for part in key if type(part) not in (str, int)]
    if wrong:
        raise TypeError(f"a stream's key has texts and whole numbers, not {wrong[0]!r} ({type(wrong[0]).__name__})")
    text = json.dumps([purpose, *key], ensure_ascii=False)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    # Four words are the whole pool of a SeedSequence: it pads nothing.
    return np.random.default_rng(np.frombuffer(digest[:16], dtype="<u4").tolist())
