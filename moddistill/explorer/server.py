"""Serving of the page: to this machine only, or to others with a password."""

import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable

import gradio as gr
import uvicorn
from fastapi import FastAPI, Request, Response

from moddistill.errors import UserError, invalid
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


def listen(host: str, port: int, password: str) -> socket.socket:
    """Returns a socket that listens on a port of a host; port 0 is any that is free.

    Raises:
      UserError: the host is not this machine alone and there is no password, it has no such
        address, or the port is in use.
    """
    if not password and not _is_loopback(host):
        expected = "a loopback address such as 127.0.0.1, or --password with it"
        raise invalid("--host", host, expected)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--host, --port: expected a free port, got {host}:{port}: {reason}") from None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(page: gr.Blocks, listening: socket.socket, password: str) -> None:
    """Serves the page until the process is interrupted.

    Args:
      password: if not empty, asked for with any user name.
    """
    config = uvicorn.Config(application(page, password), log_level="warning")
    uvicorn.Server(config).run(sockets=[listening])


def application(page: gr.Blocks, password: str) -> FastAPI:
    """Returns the page as an application that loads nothing from other hosts."""
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
