"""What each button does: the page's fields -> a request to the API -> the page's fields. One client a visitor, with the visitor's key."""

from __future__ import annotations

import base64
import lzma
import shutil
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
from pydantic import ValidationError

from lcl_adapter.answering import api_types
from lcl_adapter.answering.client import Endpoint, judge
from lcl_adapter.answering.client.messages import image_of
from lcl_adapter.data.sources import Picture
from lcl_adapter.data.sources.images import read_bytes
from lcl_adapter.data.sources.pocket import read_pocket
from lcl_adapter.errors import ConflictError, DataError, UserError
from lcl_adapter.page import MOST, html
from lcl_adapter.page.texts import language, say
from lcl_adapter.report.thumbs import data_url
from lcl_adapter.serve import folders

KEEP = 3600  # seconds that opened photos stay on disk for the browser to fetch
NEW_TOKENS = 256
SESSIONS = 1000  # whose last turn is known
EXAMPLE = (("key", "paperclip"), 4, 2)  # held-out classes, how many drawings of each are shown, and how many asked about
STRANGER = "mushroom"  # and one drawing of a class that is not shown
Opened = tuple[str, int, str | None] | None  # name, version (0 for none yet) and question of the set that is in the piles
Photos = Sequence[tuple[str, str | None]] | None


@dataclass
class Handlers:
    """url: of the API. keys: those of visitors who logged in, by their name; without them there is one visitor, this machine's."""

    url: str
    scratch: Path
    keys: Mapping[str, str] | None = None
    _clients: dict[str, Endpoint] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _left_as: dict[str | None, list[Any]] = field(default_factory=dict)
    _turns: dict[str | None, int] = field(default_factory=dict)
    _count: int = 0

    def __post_init__(self) -> None:
        self._thumbs = lru_cache(maxsize=16)(self._examples)

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    # Teach

    def begin(self, request: gr.Request) -> list[Any]:
        """Sets and models, in every picker."""
        try:
            names, base, first = self._models(request)
        except UserError:
            names, base, first = [], None, None
        picked = [gr.Dropdown(choices=names, value=value) for value in (first, base, first, first)]
        return [*self._pickers(request, first=True), *picked]

    def _models(self, request: gr.Request) -> tuple[list[str], str | None, str | None]:
        """All of them, the base, and the first adapter or else the base: what is asked where nothing is picked, or not yet."""
        names = self._api(request).models()
        base = "base" if "base" in names else (names[0] if names else None)
        return names, base, next((name for name in names if name != base), base)

    def add_pile(self, count: int) -> list[Any]:
        count = min(MOST, count + 1)
        return [count, *(gr.Column(visible=number < count) for number in range(MOST))]

    def save(self, request: gr.Request, name: str, opened: Opened, *fields: Any) -> list[Any]:
        """Refused where another has saved the set since it was opened here."""
        tongue = language(request)
        try:
            half = len(fields) // 2
            examples = self._piles(tongue, fields[:half], fields[half:])
            if not name:
                raise DataError(say(tongue, "no_name"))
            known = opened[1] if opened and opened[0] == name else 0  # a set that was not opened here is not to be lost unseen
            question = opened[2] if opened else None
            given = api_types.SupportSetIn(examples=examples, question=question, expected_version=known)
            stored = self._api(request).put_set(name, given)
        except ConflictError:
            return [html.note(say(tongue, "conflict"), wrong=True), opened, *self._pickers(request)]
        except (UserError, ValidationError) as error:
            return [self._wrong(tongue, error), opened, *self._pickers(request)]
        told = say(tongue, "saved", name=stored.name, version=stored.version, counts=_counts(stored.labels))
        return [html.note(told), (stored.name, stored.version, stored.question), *self._pickers(request, stored.name)]

    def _piles(self, tongue: str, labels: Sequence[str], galleries: Sequence[Photos]) -> list[api_types.LabelledImage]:
        examples = []
        for number, (label, photos) in enumerate(zip(labels, galleries, strict=True), 1):
            label = " ".join((label or "").split())
            if photos and not label:
                raise DataError(say(tongue, "label_missing", number=number))
            if label and not photos:
                raise DataError(say(tongue, "photos_missing", label=label))
            examples += [api_types.LabelledImage(label=label, image=image_of(_picture(path))) for path in _paths(photos)]
        if len({one.label for one in examples}) < 2:
            raise DataError(say(tongue, "no_labels"))
        return examples

    def load(self, name: str | None, request: gr.Request) -> list[Any]:
        tongue = language(request)
        if not name:
            return self._left(say(tongue, "no_set"))
        try:
            found = self._api(request).read_set(name, images=True)
            piles = self._on_disk([(one.label, _bytes(one.image or "")) for one in found.examples])
        except UserError as error:
            return self._left(error)
        told = say(tongue, "opened", name=found.name, version=found.version, counts=_counts(found.labels))
        return self._filled(told, (found.name, found.version, found.question), found.name, piles)

    def remove(self, name: str | None, opened: Opened, request: gr.Request) -> list[Any]:
        """What is in the piles stays there, and can be saved anew."""
        tongue = language(request)
        if not name:
            return [html.note(say(tongue, "no_set"), wrong=True), opened, *self._pickers(request)]
        try:
            self._api(request).remove_set(name)
        except UserError as error:
            return [self._wrong(tongue, error), opened, *self._pickers(request)]
        left = (name, 0, opened[2]) if opened and opened[0] == name else opened
        return [html.note(say(tongue, "removed", name=name)), left, *self._pickers(request, first=True)]

    def example(self, request: gr.Request) -> list[Any]:
        """Drawings of classes that the shipped base was not trained on."""
        classes, shots, left = EXAMPLE
        pool = {one.name: one.pictures for one in read_pocket("held_out").classes}
        piles = self._on_disk([(name, read_bytes(picture)) for name in classes for picture in pool[name][:shots]])
        further = [*(picture for name in classes for picture in pool[name][shots : shots + left]), pool[STRANGER][0]]
        asked = self._on_disk([("asked", read_bytes(picture)) for picture in further])
        queries = [str(path) for path in asked["asked"]]
        return [*self._filled(say(language(request), "example"), None, "example", piles), queries, queries]

    def clear(self) -> list[Any]:
        return self._filled("", None, "", {})

    def export(self, name: str | None, request: gr.Request) -> list[Any]:
        tongue = language(request)
        if not name:
            return [html.note(say(tongue, "no_set"), wrong=True), None]
        try:
            found = self._api(request).read_set(name, images=True)
            out = self._folder() / name
            folders.write(out, found.name, found.version, found.question, [(one.label, _bytes(one.image or "")) for one in found.examples])
            packed = shutil.make_archive(str(out), "zip", out)
        except (UserError, OSError) as error:
            return [self._wrong(tongue, error), None]
        return [html.note(""), packed]

    def take(self, file: str | None, request: gr.Request) -> list[Any]:
        """A zip that :meth:`export` made, or one of photos by folder. Its names never leave the folder it is unpacked in."""
        tongue = language(request)
        if not file:
            return self._left("")
        unpacked = self._folder()
        try:
            written = folders.read(_unpacked(Path(file), unpacked / "set"))
            piles = self._on_disk(written.examples)
        except (UserError, OSError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, ValueError, RuntimeError) as error:
            return self._left(say(tongue, "bad_zip", why=str(error).replace(str(unpacked / "set"), "")))
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)
        taken = (written.name or "", 0, written.question)
        return self._filled(say(tongue, "taken", count=len(written.examples)), taken, written.name or "", piles)

    # Ask and compare

    def ask(self, name: str | None, model: str | None, photos: Photos, question: str, bar: bool, request: gr.Request) -> str:
        tongue = language(request)
        try:
            paths = self._given(tongue, name, photos)
            found = self._classified(request, str(name), model or self._models(request)[2], paths, question.strip() or None)
            return html.judged(tongue, paths, found, self._thumbs(_who(request), str(name), found.version), bar)
        except (UserError, ValidationError) as error:
            return self._wrong(tongue, error)

    def compare(self, name: str | None, base: str | None, adapter: str | None, photos: Photos, bar: bool, request: gr.Request) -> str:
        tongue = language(request)
        try:
            paths = self._given(tongue, name, photos)
            _, plain, first = self._models(request)
            told = [(model, self._classified(request, str(name), model, paths)) for model in (base or plain, adapter or first)]
            pair = {f"{model}{' ' * n}": found for n, (model, found) in enumerate(told)}  # the same model twice is two pair
            return html.compared(tongue, paths, pair, self._thumbs(_who(request), str(name), told[0][1].version), bar)
        except (UserError, ValidationError) as error:
            return self._wrong(tongue, error)

    def _given(self, tongue: str, name: str | None, photos: Photos) -> list[Path]:
        if not name:
            raise DataError(say(tongue, "no_set"))
        if not photos:
            raise DataError(say(tongue, "no_photos"))
        return _paths(photos)

    def _classified(
        self, request: gr.Request, name: str, model: str | None, paths: Sequence[Path], question: str | None = None
    ) -> api_types.ClassifyOut:
        return judge(self._api(request), name, [_picture(path) for path in paths], model, question)

    # Chat

    def chat(
        self, message: Mapping[str, Any], talk: list[dict[str, Any]], model: str | None, name: str | None, request: gr.Request
    ) -> Iterator[list[Any]]:
        """The answer as it is said. What goes wrong leaves the message where it was, to be sent again."""
        tongue, text, files = language(request), str(message.get("text") or "").strip(), [Path(f) for f in message.get("files") or ()]
        if not text and not files:
            yield [gr.skip()] * 4
            return
        asked = {"role": "user", "text": text, "files": [str(file) for file in files]}
        said, turn = "", self._next_turn(request)
        try:
            messages = [_message(one) for one in (*talk, asked)]
            more = {"support_set": name} if name else {}
            yield [{"text": "", "files": []}, talk, _told([*talk, asked, {"role": "assistant", "text": "…", "files": []}]), html.note("")]
            for piece in self._api(request).stream(str(model or self._models(request)[2]), messages, NEW_TOKENS, **more):
                if self._turns.get(request.session_hash) != turn:  # leaving the stream ends the server's work
                    break
                said += piece
                answer = {"role": "assistant", "text": said, "files": []}
                yield [gr.skip(), [*talk, asked, answer], _told([*talk, asked, answer]), html.note("")]
        except UserError as error:
            if self._turns.get(request.session_hash) == turn:
                yield [dict(message), talk, _told(talk), self._wrong(tongue, error)]
                return
        if self._turns.get(request.session_hash) != turn:
            yield self._left_as.get(request.session_hash, [gr.skip()] * 4)  # a piece that was on its way may have been shown after it
            return
        if not said.strip():
            answer = {"role": "assistant", "text": say(tongue, "silent"), "files": []}
            yield [gr.skip(), [*talk, asked, answer], _told([*talk, asked, answer]), html.note("")]
        yield [gr.skip()] * 4  # what is yielded last is shown once more at the end, when it may no longer be true

    def stop(self, talk: list[dict[str, Any]], request: gr.Request) -> list[Any]:
        """What was said so far stays."""
        left = [gr.skip(), talk, _told(talk), html.note("")]
        self._next_turn(request, left)
        return left

    def forget(self, request: gr.Request) -> list[Any]:
        self._next_turn(request, [gr.skip(), [], [], html.note("")])
        return [{"text": "", "files": []}, [], [], html.note("")]

    def _next_turn(self, request: gr.Request, left: list[Any] | None = None) -> int:
        """Of this browser window; an answer to an earlier turn is not shown any more. ``left``: what is to be seen instead."""
        with self._lock:
            self._count += 1
            self._turns[request.session_hash] = self._count
            self._left_as[request.session_hash] = left or [gr.skip()] * 4
            while len(self._turns) > SESSIONS:
                oldest = next(iter(self._turns))
                self._turns.pop(oldest)
                self._left_as.pop(oldest, None)
            return self._count

    # What they share

    def _api(self, request: gr.Request) -> Endpoint:
        who = _who(request)
        with self._lock:
            if who not in self._clients:
                self._clients[who] = Endpoint(self.url, key=self.keys[who] if self.keys is not None else None)
            return self._clients[who]

    def _pickers(self, request: gr.Request, chosen: str | None = None, first: bool = False) -> list[Any]:
        """The four pickers of sets, the chat's with none of them to choose. Where nothing was chosen they stay where they are."""
        try:
            names = [one.name for one in self._api(request).sets()]
        except UserError:
            names = []
        chosen = chosen or (names[0] if first and names else None)
        value: dict[str, Any] = {"value": chosen} if chosen else {} if names else {"value": None}
        free = [("–", ""), *((name, name) for name in names)]
        return [*(gr.Dropdown(choices=list(names), **value) for _ in range(3)), gr.Dropdown(choices=free)]

    def _examples(self, who: str, name: str, version: int) -> tuple[str, ...]:
        """The set's photos, small."""
        told = self._clients[who].read_set(name, images=True)
        if told.version != version:
            return ()
        return tuple(data_url(Picture(Path(one.sha256), data=_bytes(one.image or ""))) for one in told.examples)

    def _filled(self, told: str, opened: Opened, name: str, piles: Mapping[str, Sequence[Path]]) -> list[Any]:
        """Status, what is open, its name, and the piles. A set of more labels than the page has is not cut: it is refused by :meth:`_on_disk`."""
        labels = [*piles, *[""] * (MOST - len(piles))]
        photos = [[str(path) for path in piles[label]] if label else None for label in labels]
        count = max(2, len(piles))
        return [html.note(told), opened, name, count, *labels, *photos, *(gr.Column(visible=number < count) for number in range(MOST))]

    def _left(self, told: str | Exception) -> list[Any]:
        """The piles as they are, and what went wrong."""
        text = _plain(self.url, told) if isinstance(told, Exception) else told
        return [html.note(text, wrong=bool(text)), *[gr.skip()] * (3 + 3 * MOST)]

    def _wrong(self, tongue: str, error: Exception) -> str:
        if isinstance(error, ValidationError):
            told = "; ".join(one["msg"].removeprefix("Value error, ") for one in error.errors()[:3])
        else:
            told = _plain(self.url, error)
        return html.note(say(tongue, "failed", why=told) if not isinstance(error, DataError) else told, wrong=True)

    def _folder(self) -> Path:
        """A new one; those of an hour ago are removed."""
        for old in self.scratch.iterdir():
            if old.stat().st_mtime < time.time() - KEEP:
                shutil.rmtree(old, ignore_errors=True)
        return Path(tempfile.mkdtemp(dir=self.scratch))

    def _on_disk(self, examples: Sequence[tuple[str, bytes]]) -> dict[str, list[Path]]:
        """For the browser to fetch, byte for byte what is stored. Raises DataError for more labels than there are piles."""
        labels = len({label for label, _ in examples})
        if labels > MOST:
            raise DataError(f"{labels} labels are more than the {MOST} this page shows; `lcl-adapter support` takes it.")
        folder = self._folder()
        piles: dict[str, list[Path]] = {}
        for number, (label, data) in enumerate(examples):
            kind = api_types.data_url(data[:16]).partition("/")[2].partition(";")[0]
            path = folder / f"{number:03d}.{kind}"
            path.write_bytes(data)
            piles.setdefault(label, []).append(path)
        return piles


def _unpacked(file: Path, out: Path) -> Path:
    """Raises DataError for more than a set can be; entries that are links or lead outside are written inside or not at all (zipfile)."""
    with zipfile.ZipFile(file) as archive:
        listed = archive.infolist()
        if sum(one.file_size for one in listed) > folders.LARGEST or len(listed) > 4 * api_types.MAX_IMAGES:
            raise DataError(f"it unpacks to more than {folders.LARGEST >> 20} MiB or {4 * api_types.MAX_IMAGES} files.")
        archive.extractall(out)
    inside = [path for path in out.iterdir() if path.name != "__MACOSX"]
    return inside[0] if len(inside) == 1 and not (out / folders.SHEET).exists() else out


def _who(request: gr.Request) -> str:
    return request.username or ""


def _picture(path: str | Path) -> Picture:
    """Named as the visitor knows it, without this machine's folders. Raises DataError where the upload was tidied away in the meantime."""
    path = Path(path)
    try:
        return Picture(Path(path.name), data=path.read_bytes() or b"\0")
    except OSError as error:
        raise DataError(f"{path.name}: is not here any more; add the photo again.") from error


def _paths(photos: Photos) -> list[Path]:
    return [Path(one[0]) for one in photos or ()]


def _bytes(url: str) -> bytes:
    return base64.b64decode(url.partition(",")[2])


def _counts(labels: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {label}" for label, count in labels.items())


def _plain(url: str, error: Exception) -> str:
    """The visitor did not name a server, and need not read its address."""
    return str(error).replace(f"{url}: ", "").replace(url, "")


def _message(one: Mapping[str, Any]) -> dict[str, Any]:
    images = [{"type": "image_url", "image_url": {"url": image_of(_picture(file))}} for file in one["files"]]
    return {"role": one["role"], "content": [*images, {"type": "text", "text": one["text"]}] if images else one["text"]}


def _told(talk: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As the chat shows it: photos first, as the model sees them."""
    listed: list[dict[str, Any]] = []
    for one in talk:
        listed += [{"role": one["role"], "content": {"path": file}} for file in one["files"]]
        if one["text"] or not one["files"]:
            listed.append({"role": one["role"], "content": one["text"]})
    return listed
