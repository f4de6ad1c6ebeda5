"""Who uses the page: log-ins with a name and its key, and what belongs to each visitor.

Without keys there is one visitor, this machine's, whose name is empty.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections import OrderedDict
from html import escape
from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import Scope

from lcl_adapter.page.texts import message
from lcl_adapter.serve.http.keys import Keys
from lcl_adapter.serve.http.origins import is_encrypted

COOKIE = "lcl-session"
SESSION_SECONDS = 24 * 3600  # after the last request
MAX_SESSIONS = 10_000  # the one that is unused for the longest time ends first
MAX_NAMES = 100_000  # of browser windows and their events
TEMPLATE = (Path(__file__).parent / "login.html").read_text(encoding="utf-8")


class Visitors:
    """Sessions in memory. A session's token is in the cookie alone; here is its digest."""

    def __init__(self, keys: Keys | None) -> None:
        self._keys = keys
        self.keys: dict[str, str] = {}  # of the visitors who have logged in, by name
        self._sessions: OrderedDict[str, tuple[str, float]] = OrderedDict()  # digest -> (visitor, time of the last request)
        self._owners: OrderedDict[str, str | None] = OrderedDict()
        self._lock = threading.Lock()

    def log_in(self, name: str, key: str) -> str | None:
        """The token of a new session; None if the name does not have this key."""
        caller = self._keys.find(key) if self._keys else None
        if caller is None or caller.namespace != name:
            return None
        token = secrets.token_urlsafe(32)
        with self._lock:
            self.keys[name] = key
            self._sessions[_digest(token)] = (name, time.monotonic())
            while len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
        return token

    def log_out(self, scope: Scope) -> None:
        with self._lock:
            self._sessions.pop(_digest(_token(scope)), None)

    def find(self, scope: Scope) -> str | None:
        """The visitor of a request; None: not logged in."""
        if self._keys is None:
            return ""
        digest, now = _digest(_token(scope)), time.monotonic()
        with self._lock:
            name, used = self._sessions.pop(digest, (None, now))
            if name is None or now - used > SESSION_SECONDS:
                return None
            self._sessions[digest] = (name, now)
            return name

    def owns(self, visitor: str, name: object) -> bool:
        """Whether a browser window or an event is the visitor's. The first who names a window owns it."""
        if not isinstance(name, str) or not 1 <= len(name) <= 100:
            return False
        with self._lock:
            owner = self._owners.setdefault(name, visitor)
            self._owners.move_to_end(name)
            while len(self._owners) > MAX_NAMES:
                self._owners.popitem(last=False)
        return owner == visitor


def cookie_of(scope: Scope, token: str, seconds: int | None = None) -> str:
    """A Set-Cookie header. No other page's request has the cookie, and no script can read it."""
    secure = "; Secure" if is_encrypted(scope) else ""
    age = "" if seconds is None else f"; Max-Age={seconds}"
    return f"{COOKIE}={token}; Path=/; HttpOnly; SameSite=Strict{secure}{age}"


def login_page(scope: Scope) -> str:
    language = "ja" if Headers(scope=scope).get("accept-language", "").lower().startswith("ja") else "en"
    texts = {key: escape(message(language, key)) for key in ("login", "username", "password", "wrong_key")}
    page = TEMPLATE.replace("{language}", language)
    for key, text in texts.items():
        page = page.replace(f"{{{key}}}", text)
    return page


def folder_of(scratch: Path, visitor: str) -> Path:
    """The visitor's own folder for photos. The name is a digest, so that no two names share a folder on any disk."""
    return scratch / f"visitor-{_digest(visitor)[:32]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _token(scope: Scope) -> str:
    return HTTPConnection(scope).cookies.get(COOKIE, "")
