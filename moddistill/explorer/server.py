"""The server of the page, which loads nothing from other hosts and may ask for a password."""

import hmac
from collections.abc import Awaitable, Callable

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request, Response

from moddistill.explorer.page import style_file

# The browser refuses everything from other hosts. Gradio compiles the templates of its components,
# and answers come from events of the page itself.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "frame-ancestors 'none'"
)
_FONTS = ("system-ui", "sans-serif")
_FIXED_WIDTH = ("ui-monospace", "monospace")


def page_server(page: gr.Blocks, password: str = "") -> uvicorn.Server:
    """Returns a server of the page, to be run with a listening socket.

    Args:
      password: if not empty, asked for with any user name.
    """
    return uvicorn.Server(uvicorn.Config(_application(page, password), log_level="warning"))


def _application(page: gr.Blocks, password: str) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def refuse_other_hosts(
        request: Request, respond: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        response = await respond(request)
        response.headers["Content-Security-Policy"] = _POLICY
        return response

    def is_right(_: str, given: str) -> bool:
        return hmac.compare_digest(given.encode(), password.encode())

    return gr.mount_gradio_app(
        app,
        page,
        path="",
        auth=is_right if password else None,
        auth_message="The password of --password, with any user name.",
        theme=gr.themes.Base(font=_FONTS, font_mono=_FIXED_WIDTH),
        css_paths=style_file(),
        footer_links=[],
        run_history=False,
        max_file_size="64mb",
        show_error=False,
    )
