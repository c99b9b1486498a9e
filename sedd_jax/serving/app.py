"""A local web page for a run: it shows step by step how text with gaps is filled, for several samplers side by side.

The page is one file, page.html. It reads `/api/run` once, and `/api/draw` as server-sent events for every column.
"""

import base64
import contextlib
import functools
import hashlib
import ipaddress
import json
import pathlib
import re
import socket
import sys
import webbrowser
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from sedd_jax.runtime import errors, storage
from sedd_jax.serving import queue, requests

try:
    import uvicorn
    from starlette import applications, concurrency, datastructures, exceptions, responses, routing, types
    from starlette import requests as http

    from sedd_jax.serving import connections
except ImportError as error:
    raise errors.UserError(
        "the page needs packages that are not installed", remedy="pip install 'sedd_jax[serve]'"
    ) from error

PAGE = pathlib.Path(__file__).with_name("page.html")
MAX_OPEN = 128  # requests at once: waiting, being drawn, or being read
_SECONDS_TO_CLOSE = 2
_BUFFER = 2**20  # bytes of a request's head that are read; a query that is too long gets an answer up to this size
_BACKLOG = 512  # connections that are accepted at once
_LOCAL = ("localhost", "127.0.0.1", "::1")


def serve(
    workdir: storage.Directory,
    *,
    step: int | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    opens: bool = False,
    allowed_hosts: Sequence[str] = (),
) -> None:
    """Serves the page of a run until it is interrupted. Its address is printed once it answers.

    Args:
        workdir: the run directory.
        step: the checkpoint; the newest if None.
        host: address to listen at. Other machines reach the page only if this is not the local host.
        port: the port; 0 for any that is free.
        opens: whether to open the page in the browser.
        allowed_hosts: names beside the address by which browsers may ask for the page, as behind a proxy.

    Raises:
        errors.UserError: where a name is none, the run has no checkpoint, or the server cannot listen at the address.
    """
    for name in allowed_hosts:
        if not _may_be_allowed(name):
            raise errors.UserError(
                "is not a name alone",
                field="allowed_host",
                value=name,
                remedy="give what stands between http:// and the port or the next /, one flag for each",
            )
    with contextlib.closing(_listen(host, port)) as listener:
        opened = requests.open_run(workdir, step)
        run = opened.checkpoint.run
        name = "" if run.is_autoregressive else f"{run.config.sampling.sampler}, "
        print(f"compiling the program that draws ({name}1 sample)", file=sys.stderr, flush=True)
        requests.draw(opened, requests.parse(run, ""), lambda name, content: None)
        if host not in _LOCAL:
            print(f"--host={host}: everybody who can reach this machine can draw from the run", file=sys.stderr)
        shown = "127.0.0.1" if _is_any(host) else f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listener.getsockname()[1]}"
        print(url, flush=True)
        if opens:
            webbrowser.open(url)
        config = uvicorn.Config(
            app(opened, host=host, allowed_hosts=allowed_hosts),
            http=connections.Connection,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            h11_max_incomplete_event_size=_BUFFER,
            timeout_graceful_shutdown=_SECONDS_TO_CLOSE,
        )
        uvicorn.Server(config).run(sockets=[listener])


def app(
    opened: requests.Opened, *, host: str = "127.0.0.1", allowed_hosts: Sequence[str] = (), max_open: int = MAX_OPEN
) -> types.ASGIApp:
    """The ASGI app of a run's page and its API.

    Args:
        opened: the run.
        host: name or address by which the page may be reached, beside the local ones.
        allowed_hosts: more names by which it may be reached.
        max_open: requests at once; more are refused.
    """
    page = PAGE.read_text(encoding="utf-8")
    about = requests.describe(opened)

    @contextlib.asynccontextmanager
    async def lifespan(application: applications.Starlette) -> AsyncIterator[None]:
        application.state.line = queue.Line(max_open)
        yield
        application.state.line.close()

    async def show_page(request: http.Request) -> responses.Response:
        return responses.HTMLResponse(page)

    async def show_run(request: http.Request) -> responses.Response:
        return responses.JSONResponse(about)

    async def draw(request: http.Request) -> responses.Response:
        line = request.app.state.line
        try:
            with line.held():
                # In a thread, since compiling a pattern may take seconds.
                wanted = await concurrency.run_in_threadpool(requests.parse, opened.checkpoint.run, request.url.query)
            place = line.enter(functools.partial(requests.draw, opened, wanted))
        except queue.FullError:
            raise exceptions.HTTPException(
                503, f"{max_open} requests are open already: try again in a moment", {"Retry-After": "2"}
            ) from None
        return Events(line, place)

    routes = [
        routing.Route("/", show_page),
        routing.Route("/api/run", show_run),
        routing.Route("/api/draw", _only_get(draw)),
    ]
    handlers = {requests.RefusedError: _refused, exceptions.HTTPException: _refused_by_http}
    inner = applications.Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    return _guarded(inner, page, host, allowed_hosts)


class Events(responses.StreamingResponse):
    """A response that sends the events of a place in the line. The place is left however the response ends."""

    def __init__(self, line: queue.Line, place: queue.Place):
        super().__init__(_as_text(line.read(place)), media_type="text/event-stream")
        self._leave = functools.partial(line.leave, place)

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


async def _as_text(events: AsyncIterator[queue.Event]) -> AsyncIterator[str]:
    async for name, content in events:
        yield f"event: {name}\ndata: {json.dumps(content, ensure_ascii=False)}\n\n"


def _refused(request: http.Request, error: Exception) -> responses.Response:
    assert isinstance(error, requests.RefusedError)
    return responses.JSONResponse({"error": str(error)}, error.status)


def _refused_by_http(request: http.Request, error: Exception) -> responses.Response:
    assert isinstance(error, exceptions.HTTPException)
    known = {404: "there is nothing at this address: the page is at /", 405: "only GET is answered here"}
    message = known.get(error.status_code, error.detail)
    return responses.JSONResponse({"error": message}, error.status_code, headers=error.headers)


def _only_get(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps an endpoint so that it refuses HEAD, for which Starlette would run the endpoint of GET."""

    async def answer(request: http.Request) -> responses.Response:
        if request.method != "GET":
            raise exceptions.HTTPException(405, headers={"Allow": "GET"})
        return await endpoint(request)

    return answer


def _guarded(inner: types.ASGIApp, page: str, host: str, allowed_hosts: Sequence[str]) -> types.ASGIApp:
    """Refuses requests that other sites make a browser send, and limits the page to its own scripts and server.

    The Host header must have a name of this server. Otherwise another site could get in by a name of its own that
    resolves to this machine (DNS rebinding). If the server listens at all addresses, any address is accepted, too.
    """
    headers = {
        "Content-Security-Policy": _policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    own = {*_LOCAL, host.lower(), *(name.lower() for name in allowed_hosts)}
    if _is_any(host):
        own |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def guarded(scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        if scope["type"] != "http":
            await inner(scope, receive, send)
            return

        async def send_with_headers(message: types.Message) -> None:
            if message["type"] == "http.response.start":
                datastructures.MutableHeaders(scope=message).update(headers)
            await send(message)

        asked = datastructures.Headers(scope=scope)
        refused = None
        name = _name_in(asked.get("host", "")).lower()
        if name not in own and not (_is_any(host) and _is_address(name)):
            remedy = "use its own address"
            if _may_be_allowed(name):
                remedy += f", or add --allowed_host={name} to `sedd serve`"
            refused = f"the page is not served under {asked.get('host', '')!r}: {remedy}"
        elif scope["path"].startswith("/api/") and asked.get("sec-fetch-site") in ("cross-site", "same-site"):
            refused = "another site may not ask for this: open the page itself"
        if refused is None:
            await inner(scope, receive, send_with_headers)
        else:
            await responses.JSONResponse({"error": refused}, 403)(scope, receive, send_with_headers)

    return guarded


def _name_in(host: str) -> str:
    """The name or address in a Host header, without the port."""
    return re.sub(r":[0-9]*$", "", host).removeprefix("[").removesuffix("]")


def _may_be_allowed(name: str) -> bool:
    return _is_address(name) or re.fullmatch(r"[A-Za-z0-9._-]{1,253}", name) is not None


def _policy(page: str) -> str:
    """A Content-Security-Policy that allows the page's own script and style, by their digests, and its own server."""

    def digests(tag: str) -> str:
        bodies = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        found = (base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies)
        return " ".join(f"'sha256-{digest}'" for digest in found)

    return (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _is_any(host: str) -> bool:
    return _is_address(host) and ipaddress.ip_address(host).is_unspecified


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, made before anything is compiled, so that a port in use is reported at once."""
    if not 0 <= port < 2**16:
        remedy = "give one from 1 to 65535, or 0 for any that is free"
        raise errors.UserError("is not a port", field="port", value=port, remedy=remedy)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise errors.UserError(
            "is not an address of this machine", field="host", value=host, remedy="give one, or a name of it"
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise errors.UserError(
            f"cannot listen at {errors.name('host')}={host} {errors.name('port')}={port}, {error.strerror}",
            remedy=f"give another {errors.name('port')}, or 0 for any that is free",
        ) from error
    return listener
