"""What each button does: it turns the page's fields into a request to the API, and the response into new fields.

Each visitor has a client of the API, with the visitor's key. Handlers return values for Gradio's components, in the
order that ``blocks.py`` gives as their outputs.
"""

from __future__ import annotations

import shutil
import threading
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
from lcl_adapter.answering.faults import message_of
from lcl_adapter.data.sources import Picture, read_class_folders
from lcl_adapter.data.sources.images import read_bytes
from lcl_adapter.data.sources.pocket import read_pocket
from lcl_adapter.errors import ConflictError, DataError, MissingError, UserError
from lcl_adapter.packaged import PHOTO_EXAMPLE
from lcl_adapter.page import MAX_LABELS, html
from lcl_adapter.page.photos import Gallery, bytes_of, digest_of, labelled_bytes, paths_of, picture_of, unpack, write_photos
from lcl_adapter.page.pictures import ARCHIVES, EXPORTS, new_folder
from lcl_adapter.page.texts import language_of, message
from lcl_adapter.page.visitors import folder_of
from lcl_adapter.report.thumbs import data_url
from lcl_adapter.serve import folders

MAX_NEW_TOKENS = 256
MAX_SESSIONS = 1000  # browser windows whose current turn of the chat is remembered
EXAMPLE_CLASSES = ("key", "paperclip")  # held-out classes
EXAMPLE_SHOTS, EXAMPLE_QUERIES = 4, 2  # of each class
EXAMPLE_UNKNOWN = "mushroom"  # one query is of this class, which is not in the set
# name, version (0: not stored yet) and question of the set in the fields
OpenedSet = tuple[str, int, str | None] | None
ChatMessage = Mapping[str, Any]  # role, text, files


Example = tuple[list[tuple[str, Picture]], list[Picture]]  # labelled pictures, and those to ask about


def example_drawings() -> Example:
    pool = {held_out.name: held_out.pictures for held_out in read_pocket("held_out").classes}
    shown = [(name, picture) for name in EXAMPLE_CLASSES for picture in pool[name][:EXAMPLE_SHOTS]]
    queries = [picture for name in EXAMPLE_CLASSES for picture in pool[name][EXAMPLE_SHOTS : EXAMPLE_SHOTS + EXAMPLE_QUERIES]]
    return shown, [*queries, pool[EXAMPLE_UNKNOWN][0]]


def example_photos() -> Example:
    pool = read_class_folders(PHOTO_EXAMPLE / "labelled")
    shown = [(tools.name, picture) for tools in pool.classes for picture in tools.pictures]
    return shown, [Picture(path) for path in sorted((PHOTO_EXAMPLE / "new").iterdir())]


@dataclass
class Handlers:
    """The functions behind the page's buttons.

    url: of the API. scratch: the folder of all visitors' files.
    keys: of the visitors who logged in, by name; None: one visitor, on this machine.
    photos: whether the example set is of photos, for the photo base.
    """

    url: str
    scratch: Path
    keys: Mapping[str, str] | None = None
    photos: bool = False
    _clients: dict[str, Endpoint] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _last_turn: int = 0
    _turns: dict[str | None, int] = field(default_factory=dict)  # the current turn of the chat, by browser window
    # what a turn shows at its end, if a newer turn has ended it
    _after_end: dict[str | None, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._cached_thumbs = lru_cache(maxsize=16)(self._thumbs)

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    # Teach

    def begin(self, request: gr.Request) -> list[Any]:
        """The choices of all pickers of sets and models."""
        try:
            names, base, default = self._models(request)
        except UserError:
            names, base, default = [], None, None
        models = [gr.Dropdown(choices=names, value=value) for value in (default, base, default, default)]
        return [*self._set_pickers(request, choose_first=True), *models]

    def _models(self, request: gr.Request) -> tuple[list[str], str | None, str | None]:
        """All models, the base, and the default: the first adapter, or the base if there is none."""
        names = self._api(request).models()
        base = "base" if "base" in names else (names[0] if names else None)
        return names, base, next((name for name in names if name != base), base)

    def add_group(self, count: int) -> list[Any]:
        count = min(MAX_LABELS, count + 1)
        return [count, *(gr.Column(visible=number < count) for number in range(MAX_LABELS))]

    def save(self, request: gr.Request, name: str, opened: OpenedSet, *fields: Any) -> list[Any]:
        """Store the set, unless another visitor has saved it since it was opened here.

        fields: all labels, then all galleries.
        """
        language = language_of(request)
        try:
            half = len(fields) // 2
            examples = self._examples(language, fields[:half], fields[half:], self._stored_photos(request, opened, fields[half:]))
            if not name:
                raise DataError(message(language, "no_name"))
            # 0: a set that was not opened here is not overwritten
            version = opened[1] if opened and opened[0] == name else 0
            question = opened[2] if opened else None
            stored = self._api(request).put_set(name, api_types.SupportSetIn(examples=examples, question=question, expected_version=version))
        except ConflictError:
            return [html.note(message(language, "conflict"), error=True), opened, *self._set_pickers(request)]
        except (UserError, ValidationError) as error:
            return [self._error_note(language, error), opened, *self._set_pickers(request)]
        text = message(language, "saved", name=stored.name, version=stored.version, counts=_label_counts(stored.labels))
        return [html.note(text), (stored.name, stored.version, stored.question), *self._set_pickers(request, stored.name)]

    def _stored_photos(self, request: gr.Request, opened: OpenedSet, galleries: Sequence[Gallery]) -> dict[str, str]:
        """Photos of the opened set as they are stored, by digest: saving it again stores the same bytes.

        Empty if the set is no longer stored, or no photo of it is in the fields.
        """
        if not opened or not opened[1] or not any(digest_of(path) for photos in galleries for path in paths_of(photos)):
            return {}
        try:
            stored = self._api(request).read_set(opened[0], images=True, version=opened[1])
        except MissingError:
            return {}
        return {example.sha256: example.image for example in stored.examples if example.image}

    def _examples(
        self, language: str, labels: Sequence[str], galleries: Sequence[Gallery], stored: Mapping[str, str]
    ) -> list[api_types.LabelledImage]:
        """stored: photos of the opened set as they are stored, by digest."""
        examples = []
        for number, (label, photos) in enumerate(zip(labels, galleries, strict=True), 1):
            label = " ".join((label or "").split())
            if photos and not label:
                raise DataError(message(language, "label_missing", number=number))
            if label and not photos:
                raise DataError(message(language, "photos_missing", label=label))
            for path in paths_of(photos):
                image = stored.get(digest_of(path) or "") or image_of(picture_of(path))
                examples.append(api_types.LabelledImage(label=label, image=image))
        if len({example.label for example in examples}) < 2:
            raise DataError(message(language, "no_labels"))
        return examples

    def load(self, name: str | None, request: gr.Request) -> list[Any]:
        """Open a stored set."""
        language = language_of(request)
        if not name:
            return self._unchanged_groups(message(language, "no_set"))
        try:
            stored = self._api(request).read_set(name, images=True)
            groups = write_photos(self._folder(request), labelled_bytes(stored))
        except UserError as error:
            return self._unchanged_groups(error)
        text = message(language, "opened", name=stored.name, version=stored.version, counts=_label_counts(stored.labels))
        return self._filled_groups(text, (stored.name, stored.version, stored.question), stored.name, groups)

    def remove(self, name: str | None, opened: OpenedSet, request: gr.Request) -> list[Any]:
        """Remove a stored set. The fields stay as they are, and can be saved again."""
        language = language_of(request)
        if not name:
            return [html.note(message(language, "no_set"), error=True), opened, *self._set_pickers(request)]
        try:
            self._api(request).remove_set(name)
        except UserError as error:
            return [self._error_note(language, error), opened, *self._set_pickers(request)]
        opened = (name, 0, opened[2]) if opened and opened[0] == name else opened
        return [html.note(message(language, "removed", name=name)), opened, *self._set_pickers(request, choose_first=True)]

    def example(self, request: gr.Request) -> list[Any]:
        """Fill the groups and the queries: with photos on the photo base, else with drawings that the shipped base was not trained on."""
        shown, queries = example_photos() if self.photos else example_drawings()
        groups = write_photos(self._folder(request), [(name, read_bytes(picture)) for name, picture in shown])
        paths = write_photos(self._folder(request), [("query", read_bytes(picture)) for picture in queries])["query"]
        gallery = [str(path) for path in paths]
        text = message(language_of(request), "example_photos" if self.photos else "example")
        return [*self._filled_groups(text, None, "tools" if self.photos else "example", groups), gallery, gallery]

    def clear(self) -> list[Any]:
        return self._filled_groups("", None, "", {})

    def export(self, name: str | None, request: gr.Request) -> list[Any]:
        """Write a stored set as a zip file of a folder."""
        language = language_of(request)
        if not name:
            return [html.note(message(language, "no_set"), error=True), None]
        try:
            stored = self._api(request).read_set(name, images=True)
            out = new_folder(self._folder(request), EXPORTS) / name
            folders.write(out, stored.name, stored.version, stored.question, labelled_bytes(stored))
            archive = shutil.make_archive(str(out), "zip", out)
        except (UserError, OSError) as error:
            return [self._error_note(language, error), None]
        return [html.note(""), archive]

    def import_set(self, file: str | None, request: gr.Request) -> list[Any]:
        """Fill the groups from a zip file that :meth:`export` wrote, or of photos in a folder per label."""
        language = language_of(request)
        if not file:
            return self._unchanged_groups("")
        folder = new_folder(self._folder(request), ARCHIVES)
        try:
            content = folders.read(unpack(Path(file), folder / "set"))
            groups = write_photos(self._folder(request), content.examples)
        except (UserError, OSError, ValueError) as error:
            return self._unchanged_groups(message(language, "bad_zip", why=str(error).replace(str(folder / "set"), "")))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        text = message(language, "imported", count=len(content.examples))
        return self._filled_groups(text, (content.name or "", 0, content.question), content.name or "", groups)

    # Ask and compare

    def ask(self, name: str | None, model: str | None, photos: Gallery, question: str, reject: bool, request: gr.Request) -> str:
        language = language_of(request)
        try:
            paths = self._query_paths(language, name, photos)
            _, base, default = self._models(request)
            asked, own_question = model or default, question.strip() or None
            response = self._classify(request, str(name), asked, paths, own_question)
            by_base = self._classify(request, str(name), base, paths, own_question) if base not in {None, asked} else None
            thumbs = self._cached_thumbs(_visitor(request), str(name), response.version)
            return html.results(language, paths, response, thumbs, reject, by_base)
        except (UserError, ValidationError) as error:
            return self._error_note(language, error)

    def compare(self, name: str | None, base: str | None, adapter: str | None, photos: Gallery, reject: bool, request: gr.Request) -> str:
        language = language_of(request)
        try:
            paths = self._query_paths(language, name, photos)
            _, default_base, default = self._models(request)
            models = (base or default_base, adapter or default)
            responses = [(str(model), self._classify(request, str(name), model, paths)) for model in models]
            thumbs = self._cached_thumbs(_visitor(request), str(name), responses[0][1].version)
            return html.comparison(language, paths, responses, thumbs, reject)
        except (UserError, ValidationError) as error:
            return self._error_note(language, error)

    def _query_paths(self, language: str, name: str | None, photos: Gallery) -> list[Path]:
        """Raises DataError without a set or without photos."""
        if not name:
            raise DataError(message(language, "no_set"))
        if not photos:
            raise DataError(message(language, "no_photos"))
        return paths_of(photos)

    def _classify(
        self, request: gr.Request, name: str, model: str | None, paths: Sequence[Path], question: str | None = None
    ) -> api_types.ClassifyOut:
        return judge(self._api(request), name, [picture_of(path) for path in paths], model, question)

    # Chat

    def chat(
        self, entered: Mapping[str, Any], history: list[ChatMessage], model: str | None, name: str | None, request: gr.Request
    ) -> Iterator[list[Any]]:
        """Stream the answer. After an error the message is in its field again, to be corrected and sent again.

        entered: text and files of the message field.
        Yields the message field, the history, the chat window and the status line.
        """
        language, window = language_of(request), request.session_hash
        text, files = str(entered.get("text") or "").strip(), [str(file) for file in entered.get("files") or ()]
        if not text and not files:
            yield [gr.skip()] * 4
            return
        sent = [*history, {"role": "user", "text": text, "files": files}]

        def with_answer(answer: str) -> list[ChatMessage]:
            return [*sent, {"role": "assistant", "text": answer, "files": []}]

        answer, turn = "", self._next_turn(request)
        try:
            messages = [_api_message(entry) for entry in sent]
            extra = {"support_set": name} if name else {}
            yield [{"text": "", "files": []}, history, _chat_window(with_answer("…")), html.note("")]
            for piece in self._api(request).stream(str(model or self._models(request)[2]), messages, MAX_NEW_TOKENS, **extra):
                if self._turns.get(window) != turn:  # closing the stream ends the server's work
                    break
                answer += piece
                yield [gr.skip(), with_answer(answer), _chat_window(with_answer(answer)), html.note("")]
        except UserError as error:
            if self._turns.get(window) == turn:
                yield [dict(entered), history, _chat_window(history), self._error_note(language, error)]
                return
        if self._turns.get(window) != turn:
            # the last piece may have been shown after the turn's end: replace it
            yield self._after_end.get(window, [gr.skip()] * 4)
            return
        if not answer.strip():
            shown = with_answer(message(language, "silent"))
            yield [gr.skip(), shown, _chat_window(shown), html.note("")]
        yield [gr.skip()] * 4  # Gradio shows the last yielded value once more at the end, when it may be out of date

    def stop(self, history: list[ChatMessage], request: gr.Request) -> list[Any]:
        """End the answer. The text so far stays."""
        fields = [gr.skip(), history, _chat_window(history), html.note("")]
        self._next_turn(request, fields)
        return fields

    def forget(self, request: gr.Request) -> list[Any]:
        """Begin a new conversation."""
        self._next_turn(request, [gr.skip(), [], [], html.note("")])
        return [{"text": "", "files": []}, [], [], html.note("")]

    def _next_turn(self, request: gr.Request, fields: list[Any] | None = None) -> int:
        """Begin a new turn of this browser window, which ends the earlier one.

        fields: what the earlier turn shows at its end.
        """
        with self._lock:
            self._last_turn += 1
            self._turns[request.session_hash] = self._last_turn
            self._after_end[request.session_hash] = fields or [gr.skip()] * 4
            while len(self._turns) > MAX_SESSIONS:
                oldest = next(iter(self._turns))
                self._turns.pop(oldest)
                self._after_end.pop(oldest, None)
            return self._last_turn

    # Shared parts

    def _api(self, request: gr.Request) -> Endpoint:
        """The visitor's client."""
        visitor = _visitor(request)
        with self._lock:
            if visitor not in self._clients:
                self._clients[visitor] = Endpoint(self.url, key=self.keys[visitor] if self.keys is not None else None)
            return self._clients[visitor]

    def _folder(self, request: gr.Request) -> Path:
        """The visitor's folder for photos."""
        return folder_of(self.scratch, _visitor(request))

    def _set_pickers(self, request: gr.Request, chosen: str | None = None, choose_first: bool = False) -> list[Any]:
        """The four pickers of sets; the chat's also offers no set.

        Without ``chosen`` and ``choose_first`` their values stay.
        """
        try:
            names = [stored.name for stored in self._api(request).sets()]
        except UserError:
            names = []
        chosen = chosen or (names[0] if choose_first and names else None)
        value: dict[str, Any] = {"value": chosen} if chosen else {} if names else {"value": None}
        chat_choices = [("–", ""), *((name, name) for name in names)]
        return [*(gr.Dropdown(choices=list(names), **value) for _ in range(3)), gr.Dropdown(choices=chat_choices)]

    def _thumbs(self, visitor: str, name: str, version: int) -> tuple[str, ...]:
        """Small images of the set's photos, as data URLs. Empty if the newest version is another one."""
        stored = self._clients[visitor].read_set(name, images=True)
        if stored.version != version:
            return ()
        return tuple(data_url(Picture(Path(e.sha256), data=bytes_of(e.image or ""))) for e in stored.examples)

    def _filled_groups(self, status: str, opened: OpenedSet, name: str, groups: Mapping[str, Sequence[Path]]) -> list[Any]:
        """The status line, the opened set, its name, and the fields of all groups.

        ``groups`` has at most MAX_LABELS labels.
        """
        labels = [*groups, *[""] * (MAX_LABELS - len(groups))]
        photos = [[str(path) for path in groups[label]] if label else None for label in labels]
        count = max(2, len(groups))
        columns = [gr.Column(visible=number < count) for number in range(MAX_LABELS)]
        return [html.note(status), opened, name, count, *labels, *photos, *columns]

    def _unchanged_groups(self, status: str | Exception) -> list[Any]:
        """An error in the status line; the groups stay as they are."""
        text = self._without_url(status) if isinstance(status, Exception) else status
        return [html.note(text, error=bool(text)), *[gr.skip()] * (3 + 3 * MAX_LABELS)]

    def _error_note(self, language: str, error: Exception) -> str:
        text = "; ".join(map(message_of, error.errors()[:3])) if isinstance(error, ValidationError) else self._without_url(error)
        return html.note(message(language, "failed", why=text) if not isinstance(error, DataError) else text, error=True)

    def _without_url(self, error: Exception) -> str:
        """The error without the API's address, which the visitor did not enter."""
        return str(error).replace(f"{self.url}: ", "").replace(self.url, "")


def _visitor(request: gr.Request) -> str:
    return request.username or ""


def _label_counts(labels: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {label}" for label, count in labels.items())


def _api_message(sent: ChatMessage) -> dict[str, Any]:
    """A message in OpenAI's format."""
    images = [{"type": "image_url", "image_url": {"url": image_of(picture_of(file))}} for file in sent["files"]]
    return {"role": sent["role"], "content": [*images, {"type": "text", "text": sent["text"]}] if images else sent["text"]}


def _chat_window(history: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages for Gradio's chat window. Photos come first, as in the model's prompt."""
    entries: list[dict[str, Any]] = []
    for sent in history:
        entries += [{"role": sent["role"], "content": {"path": file}} for file in sent["files"]]
        if sent["text"] or not sent["files"]:
            entries.append({"role": sent["role"], "content": sent["text"]})
    return entries
