"""Describe images and clips with a server that has an OpenAI-compatible interface.

Frames are sent in the request as JPEG. The key never appears in messages: it is removed from texts of the
server and of libraries before they are shown.
"""

import base64
import contextlib
import io
import logging
import math
import os
import queue
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3
from PIL import Image

from data_tools.captions.asking import Answers, Frames, Look, NoCaptionError, caption_in, prompt_for
from data_tools.captions.options import ApiOptions, AskOptions
from data_tools.captions.places import CaptionLocation
from modules.control_codes import shorten
from modules.errors import MediaError, OptionError, UserError
from modules.limits import MAX_ANSWER_BYTES, MAX_WAIT_SECONDS
from modules.media.reading import Frame
from modules.text_files import parse_json

logger = logging.getLogger(__name__)

KEY = "OPENAI_API_KEY"  # environment variable
WORKERS, TIMEOUT = 4, 120.0
CONNECT_SECONDS = 20.0
TRIES = 6  # of a request
RETRIED = frozenset({408, 409, 425, 429, *range(500, 600)})  # status codes of passing failures
REJECTED = {  # status codes that every further request would get too -> why
    401: "the key is missing or wrong",
    403: "the key has no right to this",
    404: "it knows no such model or path",
}
JPEG_QUALITY = 92
NO_PROXIES: Any = {"http": None, "https": None}  # a proxy could not reach a local server
_NO_SERVER = (ConnectionRefusedError, socket.gaierror, ssl.SSLError)  # errors of a wrong address
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
# parameters that some models refuse -> their replacement, or None
OTHER_NAMES: Mapping[str, str | None] = {
    "max_tokens": "max_completion_tokens",
    "temperature": None,
    "seed": None,
}


class _TryAgain(Exception):
    """A request that may be repeated: (reason, seconds to wait; NaN if the server names none)."""


class _Session(requests.Session):
    """HTTP session that follows no redirect, since the other address would receive the key."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Return None, so that requests follows no redirect."""
        return


class ApiServer:
    """Sends requests to a caption server; threads share its settings and state."""

    def __init__(
        self, options: ApiOptions, ask: AskOptions, environment: Mapping[str, str] = os.environ
    ) -> None:
        """Set up the server that --api_base names.

        The first request is sent later, by the first caption.

        Raises:
            OptionError: If OPENAI_API_KEY holds an impossible key.
        """
        self.ask = ask
        self.timeout = options.api_timeout or TIMEOUT
        self.first_wait = 1.0  # seconds between two requests
        self._model = options.api_model
        self._workers = options.api_workers or WORKERS
        assert options.api_base is not None
        base = options.api_base.rstrip("/")
        parts = urlsplit(options.api_base)
        self._address = base if base.endswith("/chat/completions") else f"{base}/chat/completions"
        self._is_local = parts.hostname in LOCAL_HOSTS
        key = environment.get(KEY, "").strip()
        if not all("!" <= character <= "~" for character in key):
            raise OptionError(
                f"{KEY} holds a blank, a line break or a letter that no key has. Set it to the key alone."
            )
        if key and parts.scheme == "http" and not self._is_local:
            logger.warning("The key in %s is sent to %s without encryption (http).", KEY, parts.hostname)
        self._key = key
        self._stop = threading.Event()
        self._has_answered = False
        self._logged_reasons: set[str] = set()  # why the server was asked again
        self._replaced: set[str] = set()  # parameters that the model refuses

    def answer(self, locations: Sequence[CaptionLocation], look: Look) -> Answers:
        """Yield (location, caption or error) for each location, in the order in which answers arrive.

        The caller can stop at any time: requests that are still pending are then abandoned.
        """
        results_queue: queue.SimpleQueue[tuple[CaptionLocation, Any]] = queue.SimpleQueue()
        open_locations: queue.SimpleQueue[CaptionLocation] = queue.SimpleQueue()

        def work() -> None:
            """Caption locations from the queue until it is empty or the run is stopped."""
            with contextlib.suppress(queue.Empty):
                while not self._stop.is_set():
                    location = open_locations.get_nowait()
                    try:
                        results_queue.put((location, self.describe(location, look(location))))
                    except BaseException as error:
                        if not isinstance(error, (MediaError, NoCaptionError)):
                            self._stop.set()  # such an error ends the run: no more requests are sent
                        results_queue.put((location, error))

        self._stop.clear()
        for location in locations:
            open_locations.put(location)
        for number in range(min(self._workers, len(locations))):
            threading.Thread(target=work, name=f"request-{number}", daemon=True).start()
        try:
            num_left = len(locations)
            while num_left:
                try:
                    # a limited wait, because Ctrl-C on Windows is noticed only between two calls
                    location, result = results_queue.get(timeout=0.5)
                except queue.Empty:
                    continue
                num_left -= 1
                yield location, result
        finally:
            self._stop.set()

    def describe(self, location: CaptionLocation, frames: Frames) -> str:
        """Request the caption of an image or clip, up to TRIES times.

        The wait before the next try doubles each time, unless the server demands another wait.

        Raises:
            NoCaptionError: If the server returns no caption.
            UserError: If the server rejects the key or the model, or cannot be reached.
        """
        body = self._make_body(prompt_for(location, self.ask), frames)
        reason = ""
        for number in range(TRIES):
            try:
                return self._request(body)
            except _TryAgain as error:
                reason, server_seconds = error.args
            # NaN compares as false: the server demands nothing
            seconds = server_seconds if server_seconds >= 0 else self.first_wait * 2**number
            seconds = min(seconds, MAX_WAIT_SECONDS)
            is_last = number + 1 == TRIES
            if not is_last and reason not in self._logged_reasons:
                self._logged_reasons.add(reason)
                logger.warning("%s; it is asked again after %.1f s, %d times at most", reason, seconds, TRIES)
            if not is_last and self._stop.wait(seconds):
                raise NoCaptionError("the run has ended")
        raise NoCaptionError(f"{TRIES} requests failed, the last because {reason}", server_failed=True)

    def _make_body(self, prompt: str, frames: Frames) -> dict[str, Any]:
        """Return the JSON body of a chat completion request that sends frames and asks for a caption."""
        content: list[dict[str, Any]] = []
        for frame in frames:
            content.append({"type": "image_url", "image_url": {"url": _data_url(frame)}})
        content.append({"type": "text", "text": prompt})
        messages: list[dict[str, Any]] = []
        if self.ask.system_prompt:
            messages.append({"role": "system", "content": self.ask.system_prompt})
        messages.append({"role": "user", "content": content})
        body = {
            "model": self._model,
            "messages": messages,
            "max_tokens": self.ask.max_new_tokens,
            "temperature": self.ask.temperature,
        }
        # at temperature 0 the answer does not depend on a seed
        if self.ask.temperature:
            body["seed"] = self.ask.seed
        return body

    def _request(self, body: Mapping[str, Any]) -> str:
        """Send one caption request, and return the caption in the response.

        A request with a parameter that the model refuses is sent once more without it.

        Raises:
            _TryAgain: If a retry may help.
            NoCaptionError: If the server has no caption for this request.
            UserError: If every other request would fail too.
        """
        parameters: dict[str, Any] = {}
        for key, value in body.items():
            # None: the parameter is left out
            name = OTHER_NAMES[key] if key in self._replaced else key
            if name is not None:
                parameters[name] = value
        try:
            status, server_seconds, text = self._post(parameters)
        except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
            raise self._explain_connection_error(error) from None
        self._has_answered = True
        if status == 200:
            return self._caption_in(text)
        message = self._hide(_read_error_text(text))
        if status in RETRIED:
            raise _TryAgain(f"the server answers {status}: {message}", server_seconds)
        if status in REJECTED:
            remedy = f"check {KEY}" if self._key else f"set {KEY}"
            if status == 404:
                remedy = "check --api_base and --api_model"
            raise UserError(
                f"{self._address} answers {status}, {REJECTED[status]}: {message}. "
                f"Give what it wants: {remedy}."
            )
        # `_adapt` notes the parameter that the server refuses, so that the next request leaves it out
        if status == 400 and self._adapt(text, parameters):
            return self._request(body)
        if 300 <= status < 400:
            raise UserError(
                f"--api_base: {self._address} answers {status} and names another address. Give that one."
            )
        raise NoCaptionError(f"the server answers {status}: {message}")

    def _explain_connection_error(self, error: BaseException) -> UserError | _TryAgain:
        """Return the exception for a failed connection: fatal if the server never answered, else a retry."""
        cause = error
        while cause.__context__ is not None:  # the innermost error is the system's
            cause = cause.__context__
        why = self._hide(getattr(cause, "strerror", None) or str(cause))
        is_rejected = isinstance(error, requests.ConnectTimeout) or isinstance(cause, _NO_SERVER)
        if is_rejected and not self._has_answered:
            return UserError(
                f"--api_base: nothing answers at {self._address}: {why}. Start the server, or correct "
                "the address."
            )
        if isinstance(error, requests.Timeout) or isinstance(cause, TimeoutError):
            why = f"there is no whole answer within {self.timeout:g} s (--api_timeout)"
        return _TryAgain(f"the connection broke: {why}", math.nan)  # NaN: the server demands no waiting time

    def _post(self, parameters: Any) -> tuple[int, float, str]:
        """Send a request; return the status, the seconds to wait (NaN: not named by the server) and the text.

        Raises the errors of requests, and NoCaptionError if the answer is too long.
        """
        start = time.monotonic()
        with (
            _Session() as session,
            session.post(
                self._address,
                json=parameters,
                auth=self._authorize,
                timeout=(min(CONNECT_SECONDS, self.timeout), self.timeout),
                proxies=NO_PROXIES if self._is_local else None,
                stream=True,
            ) as answer,
        ):
            if "," in answer.headers.get("Content-Encoding", ""):  # a few bytes, packed twice, can be GiB
                raise NoCaptionError("the server's answer is packed more than once")
            content = bytearray()
            end = start + self.timeout
            for piece in answer.iter_content(1):  # it waits until a larger piece is full
                content += piece
                if time.monotonic() > end:  # the library's own limit starts anew with each byte
                    raise requests.ReadTimeout
                if len(content) > MAX_ANSWER_BYTES:
                    raise NoCaptionError(f"the server's answer is longer than {MAX_ANSWER_BYTES >> 20} MiB")
            try:
                server_seconds = float(answer.headers.get("Retry-After", "nan"))
            except ValueError:  # a date, or other words
                server_seconds = math.nan
            return answer.status_code, server_seconds, content.decode("utf-8", "replace")

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add the API key to a request.

        This is passed as `auth`, because without it requests sends a password from the user's netrc file.
        """
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _caption_in(self, text: str) -> str:
        """Extract the caption from a server's JSON response.

        Raises:
            NoCaptionError: If the response has another form or an empty caption.
        """
        try:
            choice = parse_json(text)["choices"][0]
            content = choice["message"].get("content")
            # the answer reached the maximum number of tokens
            was_cut = choice.get("finish_reason") == "length"
        except (ValueError, LookupError, TypeError, AttributeError):
            raise NoCaptionError(f"the server's answer is of another form: {self._hide(text)!r}") from None
        if isinstance(content, list):  # some servers return parts
            part_texts = [part.get("text") for part in content if isinstance(part, dict)]
            content = " ".join(part for part in part_texts if isinstance(part, str))
        return caption_in(content if isinstance(content, str) else "", was_cut)

    def _adapt(self, text: str, parameters: Mapping[str, Any]) -> bool:
        """Stop sending a parameter that the server refuses; return whether the request contained one."""
        for name, replacement in OTHER_NAMES.items():
            if name in parameters and any(f"{mark}{name}{mark}" in text for mark in "'\"`"):
                if name not in self._replaced:  # else another thread has noted it
                    self._replaced.add(name)
                    what = f"{replacement} is sent instead" if replacement else "its own is used"
                    logger.warning("%s does not take %s: %s", self._model, name, what)
                return True
        return False

    def _hide(self, text: str) -> str:
        """Return a text in one line for messages, shortened and without the API key."""
        if self._key:
            text = text.replace(self._key, "(the key)")
        return shorten(" ".join(text.split()), 300)


def _data_url(frame: Frame) -> str:
    """Return a frame as a JPEG data URL."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=JPEG_QUALITY)
    encoded = base64.b64encode(file.getvalue()).decode("ascii")
    return f"data:image/jpeg;base64,{encoded}"


def _read_error_text(text: str) -> str:
    """Return the error message in a server's response; without OpenAI's JSON, the response itself."""
    try:
        error = parse_json(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, TypeError):
        return text or "nothing more"
