"""POST /v1/classify: for quick tries, through the same queue as every gRPC call."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from aiohttp import web
from grpc import StatusCode

from service.host.addresses import neighbourhood
from service.host.token_bucket import TokenBuckets
from service.ops_http.errors import error_response, invalid_response, status_response
from service.playground.requests import Images, read_request
from service.rpc.call import Metadata
from service.rpc.status import Status, refusal_status, unavailable
from service.serving.gate import Gate
from service.serving.pictures import Pictures
from service.serving.request import IMAGE_BYTES, InvalidInputError, Refusal, Request

# Requests that are read or answered at once: what their bodies hold in memory is bounded by it.
MAX_AT_ONCE = 16
# Requests that one address may send, on average; for people, and a page that redraws. All addresses
# together may send so many times that: whoever has many of them gets no further.
REQUESTS_PER_S = 20.0
ALL_ADDRESSES = 10
# What a body may take to arrive, from its header on.
BODY_S = 5.0
# What an answer may take. A browser has no deadline of its own.
DEADLINE_S = 5.0
BUSY_RETRY_AFTER_S = 1.0
# Headers that stand for the metadata of an RPC.
SHOWN_HEADERS = frozenset({"Authorization"})
SHUTTING_DOWN = unavailable("the server is shutting down")
EXPIRED = Status(StatusCode.DEADLINE_EXCEEDED, f"no answer within {DEADLINE_S:g} s")


class Waiting:
    """A request of the HTTP port that waits for the core: the origin of its ``Request``.

    Attributes:
        cancelled: Nobody waits any more.
        caller: Whose token it shows: this port asks for one, and has no rate of its own for it.
        ended: Resolves to the request, once the core has ended it.
    """

    caller = ""

    def __init__(self) -> None:
        self.cancelled = False
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[Request] = self._loop.create_future()

    def end(self, request: Request) -> None:
        """The core has ended the request. From any thread."""
        self._loop.call_soon_threadsafe(self._set, request)

    def _set(self, request: Request) -> None:
        if not self.ended.done():
            self.ended.set_result(request)


def _reply(requests: Sequence[Request]) -> None:
    """See ``Reply``."""
    for request in requests:
        waiting: Waiting = request.origin  # type: ignore[assignment] # a request here has one
        waiting.end(request)


class ClassifyHandler:
    """Reads a request, feeds the queue, and answers in JSON. Lives on the event loop.

    Args:
        gate: The way into the core.
        refusal: See ``Offer``.
        is_draining: See ``Offer``.
        requests_per_s: What one address may send.
    """

    def __init__(
        self,
        gate: Gate,
        *,
        refusal: Callable[[Metadata], Status | None] | None,
        is_draining: Callable[[], bool],
        requests_per_s: float,
    ) -> None:
        self._gate = gate
        self._refusal = refusal
        self._is_draining = is_draining
        self._of_address = TokenBuckets(requests_per_s)
        self._of_all = TokenBuckets(requests_per_s * ALL_ADDRESSES)
        self._at_once = 0

    async def handle(self, request: web.Request) -> web.Response:
        """One request, within its bounds."""
        if _is_from_elsewhere(request.headers):
            # A page from elsewhere may not spend what a visitor's browser can reach.
            raise web.HTTPForbidden(text="origin: expected a page of this server, got another")
        # The token first: nobody without one may use up what an address may ask for.
        refused = self._refusal and self._refusal(_metadata(request))
        if refused:
            return status_response(refused)
        wait_s = self._wait_s(neighbourhood(request.remote or ""), time.monotonic())
        if wait_s > 0:
            return _exhausted("too many requests from this address, or from all", wait_s)
        if self._is_draining():
            return status_response(SHUTTING_DOWN)
        if self._at_once >= MAX_AT_ONCE:
            return _exhausted(f"{MAX_AT_ONCE} requests are being answered", BUSY_RETRY_AFTER_S)
        self._at_once += 1
        try:
            return await self._classify(await _read_in_time(request))
        finally:
            self._at_once -= 1

    def _wait_s(self, address: str, now: float) -> float:
        """Seconds until an address may send a request; 0 if that is now."""
        return self._of_address.take(address, 1, now) or self._of_all.take("", 1, now)

    async def _classify(self, images: Images) -> web.Response:
        waiting = Waiting()
        try:
            self._submit(images, waiting)
            async with asyncio.timeout(DEADLINE_S):
                ended = await waiting.ended
        except InvalidInputError as error:
            return invalid_response(error.violation)
        except TimeoutError:
            return status_response(EXPIRED)
        finally:
            waiting.cancelled = True  # of no effect once it is answered
        if ended.refusal is Refusal.INVALID and ended.violation is not None:
            return invalid_response(ended.violation)
        if ended.result is None:
            return status_response(refusal_status(ended))
        return web.json_response(_as_json(ended))

    def _submit(self, images: Images, waiting: Waiting) -> None:
        deadline = time.monotonic() + DEADLINE_S
        if images.files:
            self._gate.check_count("encoded.files", len(images.files))
            request = Request(b"", len(images.files), deadline, _reply, waiting)
            self._gate.prepare(request, Pictures(images.files, self._gate.judge))
        else:
            count = self._gate.count_images("pixels", len(images.pixels))
            self._gate.submit([Request(images.pixels, count, deadline, _reply, waiting)])


def _is_from_elsewhere(headers: Mapping[str, str]) -> bool:
    """Whether a browser says that a page of another server sent this.

    Browsers name the site on loopback and over TLS only, the origin with every POST; callers
    without a page name neither. Source: CrossOriginProtection of Go's net/http.
    """
    if site := headers.get("Sec-Fetch-Site"):
        return site not in ("same-origin", "none")
    origin = headers.get("Origin")
    return origin is not None and origin.partition("://")[2] != headers.get("Host")


def _metadata(request: web.Request) -> list[tuple[str, str | bytes]]:
    return [(k.lower(), v) for k, v in request.headers.items() if k in SHOWN_HEADERS]


async def _read_in_time(request: web.Request) -> Images:
    try:
        async with asyncio.timeout(BODY_S):
            return await read_request(request)
    except TimeoutError:
        text = f"body: expected all of it within {BODY_S:g} s, got a part"
        raise web.HTTPRequestTimeout(text=text) from None


def _as_json(request: Request) -> dict[str, Any]:
    """A request that has its result, as the proto3 JSON mapping of ClassifyResponse.

    Beside that it has the class ``labels``, in the order of the probabilities, and each prediction
    on an image file has ``pixels``: what the network saw, 784 bytes as base64.
    """
    result = request.result
    assert result is not None
    rows = result.probabilities[request.first : request.first + request.count]
    scores = result.scores(request.first, request.count)
    if request.plausibility is not None:
        scores = scores * request.plausibility
    predictions = [_prediction(*one) for one in zip(rows, scores, strict=True)]
    if request.plausibility is not None:
        for index, prediction in enumerate(predictions):
            image = request.images[index * IMAGE_BYTES : (index + 1) * IMAGE_BYTES]
            prediction["pixels"] = base64.b64encode(image).decode()
    model = result.model
    return {
        "predictions": predictions,
        "labels": model.artifact.labels,
        "model": {
            "name": model.name,
            "version": model.version,
            "sha256": model.sha256,
            "precision": model.precision,
            "execution_provider": model.provider,
        },
        "timing": {
            "queue_us": int((request.started - request.enqueued) * 1e6),
            "inference_us": int(request.inference_s * 1e6),
            "batch_images": request.batch_images,
        },
    }


def _prediction(probabilities: npt.NDArray[np.float32], score: np.float32) -> dict[str, Any]:
    digit = int(probabilities.argmax())
    return {
        "digit": digit,
        "confidence": _shortest(probabilities[digit]),
        "probabilities": [_shortest(value) for value in probabilities],
        "digit_score": _shortest(score),
    }


def _shortest(value: np.float32) -> float:
    """The number with the fewest digits that is this float32."""
    return float(str(value))


def _exhausted(message: str, retry_after_s: float) -> web.Response:
    return error_response(
        429, message, code=StatusCode.RESOURCE_EXHAUSTED.name, retry_after_s=retry_after_s
    )
