"""What is wrong with a field of a request, in plain words."""

from __future__ import annotations

import re
from typing import Any

EXPECTED = {
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
}


def message_of(fault: Any) -> str:
    """What is wrong with a field, of one of pydantic's ``errors()``: without the field's value, which may be a photo or a key."""
    if fault["type"] in EXPECTED:
        return f"{EXPECTED[fault['type']]} is expected"
    message: str = fault["msg"].removeprefix("Value error, ")
    return re.sub(r"^(Input|String|List|Dictionary|Value) should ", "must ", message.replace(" after validation", ""))
