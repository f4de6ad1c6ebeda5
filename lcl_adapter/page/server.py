"""The page and the API under it, on one address: what ``lcl-adapter demo`` does."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import gradio as gr
from anyio import CapacityLimiter
from fastapi import FastAPI

from lcl_adapter.page.blocks import STYLE, THEME, make_page
from lcl_adapter.page.handlers import Handlers
from lcl_adapter.page.texts import translations
from lcl_adapter.serve.api import make_app
from lcl_adapter.serve.keys import Keys
from lcl_adapter.serve.server import Options, listen
from lcl_adapter.serve.service import Service

THREADS = 32  # visitors' requests under way
LARGEST_BODY = 64 * 2**20  # as the API's own


def run(options: Options) -> None:
    """Until it is told to stop. Raises UserError before it listens, never after."""
    with tempfile.TemporaryDirectory(prefix="lcl-adapter-page-") as scratch:
        url = f"http://{_reached(options.host)}:{options.port}"
        listen(options, lambda service, keys: with_page(service, keys, url, Path(scratch)), "the page and its API")


def _reached(host: str) -> str:
    """How the page reaches the API beside it."""
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
    return everywhere.get(host, f"[{host}]" if ":" in host else host)


def with_page(service: Service, keys: Keys | None, url: str, scratch: Path) -> FastAPI:
    """The API with the page at ``/``. With keys, a visitor logs in by name and key, and sees that key's sets alone."""
    app = make_app(service, keys, page=True)
    os.environ.setdefault("GRADIO_TEMP_DIR", str(scratch / "uploads"))
    (scratch / "opened").mkdir(exist_ok=True)
    known: dict[str, str] = {}

    def log_in(name: str, key: str) -> bool:
        caller = keys.find(key) if keys else None
        if caller is None or caller.namespace != name:
            return False
        known[name] = key
        return True

    handlers = Handlers(url, scratch / "opened", known if keys else None)
    page = make_page(handlers)
    page.queue(max_size=64, default_concurrency_limit=8)
    page.limiter = CapacityLimiter(THREADS)  # type: ignore[assignment] # of its own: waiting for the API, it must not take the API's threads
    return gr.mount_gradio_app(
        app,
        page,
        "/",
        auth=log_in if keys else None,
        allowed_paths=[str(scratch)],
        show_error=False,
        max_file_size=LARGEST_BODY,  # a downloaded set comes back; a photo of it is bounded like any other
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        i18n=translations(),
        theme=THEME,
        css=STYLE,
    )
