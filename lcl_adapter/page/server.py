"""The page and the API under it, on one address: what ``lcl-adapter demo`` does."""

from __future__ import annotations

import os
from pathlib import Path

import gradio as gr
from anyio import CapacityLimiter
from fastapi import FastAPI, Request
from starlette.routing import Mount

from lcl_adapter.packaged import PHOTO
from lcl_adapter.page.blocks import STYLE, THEME, make_page
from lcl_adapter.page.guard import Guard
from lcl_adapter.page.handlers import Handlers
from lcl_adapter.page.scratch import scratch_folder
from lcl_adapter.page.texts import translations
from lcl_adapter.page.visitors import Visitors
from lcl_adapter.serve.api import make_app
from lcl_adapter.serve.http.keys import Keys
from lcl_adapter.serve.server import Options, serve_app
from lcl_adapter.serve.service import Service

MAX_THREADS = 32  # handlers that run at a time, for all visitors
MAX_UPLOAD_BYTES = 64 * 2**20  # the same as the API's limit of a request


def run(options: Options) -> None:
    """Serve page and API until a signal stops the process. Raises UserError before the port is opened, never after."""
    with scratch_folder() as scratch:
        url = f"http://{_api_host(options.host)}:{options.port}"
        serve_app(options, lambda service, keys: with_page(service, keys, url, scratch), "the page and its API")


def _api_host(host: str) -> str:
    """The host under which the page reaches the API beside it."""
    all_addresses = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
    return all_addresses.get(host, f"[{host}]" if ":" in host else host)


def with_page(service: Service, keys: Keys | None, url: str, scratch: Path) -> FastAPI:
    """The API with the page at ``/``.

    With keys, a visitor logs in with a name and its key, and sees that name's sets alone.
    """
    app = make_app(service, keys, page=True)
    scratch = scratch.resolve()
    os.environ["GRADIO_TEMP_DIR"] = str(scratch)  # Gradio copies no file that is in it
    visitors = Visitors(keys)
    on_photos = service.engine.base.family.name == PHOTO
    handlers = Handlers(url, scratch, visitors.keys if keys else None, on_photos)
    page = make_page(handlers)
    page.queue(max_size=64, default_concurrency_limit=8)
    # its own threads: handlers wait for the API, which needs threads too
    page.limiter = CapacityLimiter(MAX_THREADS)  # type: ignore[assignment]
    gr.mount_gradio_app(
        app,
        page,
        "/",
        auth_dependency=_visitor_of if keys else None,
        show_error=False,
        max_file_size=MAX_UPLOAD_BYTES,  # enough for a downloaded set; the photos in it have their own limit
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        i18n=translations(),
        theme=THEME,
        css=STYLE,
    )
    mount = next(route for route in app.routes if isinstance(route, Mount))
    mount.app = Guard(mount.app, visitors, scratch)
    return app


def _visitor_of(request: Request) -> str:
    """The visitor that the guard has let through."""
    visitor: str = request.state.visitor
    return visitor
