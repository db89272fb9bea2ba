"""The server's paths: the page, images for programs, a live view."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..sampler import Sampler
from .answers import Answer
from .encoding import listed, together
from .errors import ClientGone, RequestError, answer, failure
from .guard import Guard, json_body, unless_gone
from .limits import LOOPBACK, Limits
from .live import Live
from .offer import Offer
from .requests import asked_by_json, asked_by_url, read_json, shown
from .service import Service

_PAGE = {
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/requests.js": ("requests.js", "text/javascript"),
    "/tiles.js": ("tiles.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_FOREVER = "public, max-age=31536000, immutable"
_REVALIDATED = "private, no-cache"  # another model may be served here tomorrow


def create_app(
    sampler: Sampler,
    shape: Sequence[int],
    *,
    classes: Sequence[str] | int | None = None,
    guidance: bool = False,
    name: str = "a model",
    limits: Limits | None = None,
    allowed_hosts: Collection[str] | None = LOOPBACK,
) -> Starlette:
    """An ASGI application that draws with a sampler, for any ASGI server; ``serving`` runs it
    on uvicorn with timeouts for slow clients.

    Args:
        sampler: whose number of steps and guidance_scale are those of requests that name none. Its
            model must stay as it is; it is called with ``class_labels``, int64 [N], where there
            are classes.
        shape: [C, H, W] of one image, C = 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA; in [-1, 1].
        classes: their names, or how many; None: the model has none.
        guidance: whether the model can be called with ``class_labels=None``, too.
        name: that the page shows.
        limits: of requests.
        allowed_hosts: names by which the server may be asked; None: any.

    Raises:
        TypeError, ValueError, MemoryError: an argument out of range, or what
            ``Sampler.session`` raises.

    >>> sampler = Sampler(lambda x, t: 0 * x, NoiseSchedule.linear(), num_steps=4)
    >>> create_app(sampler, [1, 8, 8]).state.service.offer.most_steps
    1000
    """
    service = Service(Offer(sampler, shape, classes, guidance, name, limits or Limits()))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await service.close()

    app = Starlette(
        routes=[
            *(Route(path, _page(*file), methods=["GET"]) for path, file in _PAGE.items()),
            Route("/healthz", _health, methods=["GET"]),
            Route("/api/status", _status, methods=["GET"]),
            Route("/api/model", _model, methods=["GET"]),
            Route("/api/images", _images, methods=["POST"]),
            Route("/api/images/{seed}/{name}", _image, methods=["GET"]),
            Route("/api/live", _live, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, service=service, hosts=allowed_hosts)],
        exception_handlers={
            RequestError: _refused,
            ClientGone: _unheard,
            HTTPException: _http_error,
            Exception: _bug,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


# Paths -------------------------------------------------------------------------------------


def _page(file: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = importlib.resources.files(__package__).joinpath("page", file).read_bytes()

    async def page(request: Request) -> Response:
        return Response(content, headers={"cache-control": "no-cache"}, media_type=kind)

    return page


async def _health(request: Request) -> Response:
    well, message = _service(request).health()
    return answer({"status": message}, 200 if well else 503)


async def _status(request: Request) -> Response:
    return answer(_service(request).status())


async def _model(request: Request) -> Response:
    return answer(_service(request).offer.description())


async def _images(request: Request) -> Response:
    service = _service(request)
    offer = service.offer
    asked = asked_by_json(read_json(await json_body(request, service)), offer)
    with service.request():
        with service.drawings(asked.addresses) as drawings:
            pictures = await unless_gone(request.receive, service.pictures(drawings))
        loop = asyncio.get_running_loop()  # which would stand still for large ones
        if asked.format == "json":
            told = loop.run_in_executor(service.pool, listed, offer, asked.addresses, pictures)
            return Answer(await told, {"cache-control": "no-store"}, "application/json")
        file = await loop.run_in_executor(service.pool, together, pictures)
        return Answer(file, {}, "image/png")


async def _image(request: Request) -> Response:
    service, name = _service(request), request.path_params["name"]
    if not name.endswith(".png"):
        raise RequestError(404, f"no image {shown(name)}: its name is its number and .png")
    address, model = asked_by_url(
        request.path_params["seed"],
        name.removesuffix(".png"),
        request.query_params.multi_items(),
        service.offer,
    )
    if model not in (None, service.offer.fingerprint):
        raise RequestError(
            404, f"is not this one's, {service.offer.fingerprint}; got {shown(model)}", "model"
        )
    etag = service.offer.etag(address)
    headers = {"etag": etag, "cache-control": _REVALIDATED if model is None else _FOREVER}
    given = ",".join(request.headers.getlist("if-none-match"))
    known = [tag.strip() for tag in given.split(",")]
    if "*" in known or any(tag.removeprefix("W/") == etag for tag in known):
        return Response(status_code=304, headers=headers)
    if request.method == "HEAD":
        head = Response(headers=headers, media_type="image/png")
        del head.headers["content-length"]  # nobody knows it before the image is drawn
        return head
    with service.request(), service.drawings([address]) as drawings:
        (picture,) = await unless_gone(request.receive, service.pictures(drawings))
    headers["content-disposition"] = f'inline; filename="{address.seed}-{address.sample_id}.png"'
    return Answer(picture.file, headers, "image/png")


async def _live(request: Request) -> Response:
    service = _service(request)
    body = await json_body(request, service)
    return Live(service, asked_by_json(read_json(body), service.offer, live=True))


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


# Errors ------------------------------------------------------------------------------------


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error.response()


async def _unheard(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # that nobody reads


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, headers = request.url.path, dict(error.headers or {})
    message = {
        404: f"nothing is at {path:.80}",
        405: f"{path:.80} takes {headers.get('Allow', 'another method')}; got {request.method:.20}",
    }.get(error.status_code, error.detail)
    return failure(error.status_code, message, headers=headers)


async def _bug(request: Request, error: Exception) -> Response:
    return failure(500, f"an error of the server's own, {type(error).__name__}: it is in its log")
