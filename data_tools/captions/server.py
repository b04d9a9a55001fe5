"""Describe images and clips with a server that has an OpenAI-compatible interface.

Frames are sent in the request as JPEG. The key never appears in messages: it is removed from the texts of
servers and libraries before they are shown.
"""

import base64
import contextlib
import io
import logging
import os
import queue
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import requests
import urllib3
from PIL import Image

from data_tools.captions.asking import (
    AskOptions,
    CaptionResults,
    Frames,
    NoCaptionError,
    ReadFrames,
    parse_caption,
    select_prompt,
)
from data_tools.captions.places import CaptionLocation
from modules.control_codes import shorten
from modules.errors import MediaError, OptionError, UserError
from modules.limits import MAX_ANSWER_BYTES, MAX_WAIT_SECONDS
from modules.options import SENDS, Options, option
from modules.text_files import parse_json

logger = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"  # environment variable
WORKERS, TIMEOUT = 4, 120.0
CONNECT_SECONDS = 20.0
MAX_ATTEMPTS = 6  # of a request
RETRIED_STATUSES = frozenset({408, 409, 425, 429, *range(500, 600)})  # status codes of passing failures
FATAL_STATUSES = {  # status codes that every further request would get too -> reason
    401: "the key is missing or wrong",
    403: "the key does not permit this",
    404: "it has no such model or path",
}
JPEG_QUALITY = 92
NO_PROXIES: Any = {"http": None, "https": None}  # a proxy could not reach a local server
_NO_SERVER = (ConnectionRefusedError, socket.gaierror, ssl.SSLError)  # errors of a wrong address
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
# parameters that some models refuse -> their replacement, or None
PARAMETER_REPLACEMENTS: Mapping[str, str | None] = {
    "max_tokens": "max_completion_tokens",
    "temperature": None,
    "seed": None,
}


class ApiOptions(Options, title="a server of your own, OpenAI-compatible"):
    """Address, model and limits of an OpenAI-compatible caption server."""

    api_base: str | None = option(
        "address of the server, such as http://localhost:8000/v1; frames are sent there as JPEG. A key, "
        "if the server wants one, is read from the environment variable OPENAI_API_KEY",
        needs="api_model",
        facts=SENDS,
    )
    api_model: str | None = option("name of the model on the server", needs="api_base")
    api_workers: int | None = option(
        "requests at a time; default: 4", minimum=1, maximum=256, needs="api_base"
    )
    api_timeout: float | None = option(
        "seconds to wait for an answer before the request is made again; default: 120",
        minimum=1,
        needs="api_base",
    )

    def __post_init__(self) -> None:
        """Raise OptionError if --api_base is not a plain http or https address."""
        if self.api_base is None:
            return
        try:
            url = urlsplit(self.api_base)
            is_address = url.scheme in {"http", "https"} and bool(url.hostname) and url.port != 0
        except ValueError:  # such as a port that is not a number
            is_address = False
            url = urlsplit("")
        if "@" in url.netloc or url.query or url.fragment:
            raise OptionError(
                "--api_base contains a user's name, a password, or what follows ? or #. Pass the address "
                "alone, such as http://localhost:8000/v1, and a key in the environment variable "
                "OPENAI_API_KEY"
            )
        if not is_address:
            raise OptionError(f"--api_base {self.api_base}: pass an address such as http://localhost:8000/v1")


class _RetryableError(Exception):
    """A failure of a request that may succeed if the request is repeated."""

    def __init__(self, reason: str, wait_seconds: float | None) -> None:
        """Store the reason, and how long the server asks to wait; None if it does not say."""
        super().__init__(reason)
        self.reason = reason
        self.wait_seconds = wait_seconds


class _Session(requests.Session):
    """HTTP session that follows no redirect, since the other address would receive the key."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Return None, so that requests follows no redirect."""
        return


class ApiServer:
    """Sends requests to a caption server; threads share its settings and state."""

    def __init__(
        self, options: ApiOptions, ask_options: AskOptions, environment: Mapping[str, str] = os.environ
    ) -> None:
        """Set up the server that --api_base names.

        No request is sent before the first caption.

        Raises:
            OptionError: If OPENAI_API_KEY contains an impossible key.
        """
        self.ask_options = ask_options
        self.timeout = options.api_timeout or TIMEOUT
        self.first_retry_seconds = 1.0  # wait before the first retry; it doubles for each further one
        self._model = options.api_model
        self._workers = options.api_workers or WORKERS
        assert options.api_base is not None
        base_address = options.api_base.rstrip("/")
        url = urlsplit(options.api_base)
        self._address = (
            base_address if base_address.endswith("/chat/completions") else f"{base_address}/chat/completions"
        )
        self._is_local = url.hostname in LOCAL_HOSTS
        key = environment.get(KEY_VARIABLE, "").strip()
        if not all("!" <= character <= "~" for character in key):
            raise OptionError(
                f"{KEY_VARIABLE} contains a space, a line break or a character that is not valid in a key. "
                "Set it to the key alone."
            )
        if key and url.scheme == "http" and not self._is_local:
            logger.warning(
                "The key in %s is sent to %s without encryption (http).", KEY_VARIABLE, url.hostname
            )
        self._key = key
        self._stop = threading.Event()
        self._has_answered = False
        self._logged_reasons: set[str] = set()  # why the server was asked again
        self._refused_parameters: set[str] = set()  # parameters that the model refuses

    def caption(self, locations: Sequence[CaptionLocation], read_frames: ReadFrames) -> CaptionResults:
        """Yield (location, caption or error) for each location, in the order in which answers arrive.

        The caller can stop at any time: requests that are still pending are then abandoned.
        """
        pending: queue.SimpleQueue[CaptionLocation] = queue.SimpleQueue()
        results: queue.SimpleQueue[tuple[CaptionLocation, Any]] = queue.SimpleQueue()
        self._stop.clear()
        for location in locations:
            pending.put(location)
        for number in range(min(self._workers, len(locations))):
            arguments = (pending, read_frames, results)
            name = f"request-{number}"
            threading.Thread(target=self._caption_pending, args=arguments, name=name, daemon=True).start()
        try:
            num_left = len(locations)
            while num_left:
                try:
                    # a limited wait, because on Windows Ctrl-C is noticed only between two calls
                    location, result = results.get(timeout=0.5)
                except queue.Empty:
                    continue
                num_left -= 1
                yield location, result
        finally:
            self._stop.set()

    def _caption_pending(
        self,
        pending: "queue.SimpleQueue[CaptionLocation]",
        read_frames: ReadFrames,
        results: "queue.SimpleQueue[tuple[CaptionLocation, Any]]",
    ) -> None:
        """Caption locations from a queue until it is empty or the run is stopped; runs in a thread."""
        with contextlib.suppress(queue.Empty):
            while not self._stop.is_set():
                location = pending.get_nowait()
                try:
                    results.put((location, self.request_caption(location, read_frames(location))))
                except BaseException as error:
                    if not isinstance(error, (MediaError, NoCaptionError)):
                        self._stop.set()  # such an error ends the run: no more requests are sent
                    results.put((location, error))

    def request_caption(self, location: CaptionLocation, frames: Frames) -> str:
        """Request the caption of an image or clip, up to MAX_ATTEMPTS times.

        The wait before the next try doubles each time, unless the server asks for a specific wait.

        Raises:
            NoCaptionError: If the server returns no caption.
            UserError: If the server rejects the key or the model, or cannot be reached.
        """
        body = self._make_body(select_prompt(location, self.ask_options), frames)
        doubled_seconds = self.first_retry_seconds
        for _ in range(MAX_ATTEMPTS - 1):
            try:
                return self._request(body)
            except _RetryableError as error:
                reason = error.reason
                wanted_seconds = doubled_seconds if error.wait_seconds is None else error.wait_seconds
            seconds = min(wanted_seconds, MAX_WAIT_SECONDS)
            doubled_seconds *= 2
            if reason not in self._logged_reasons:
                self._logged_reasons.add(reason)
                logger.warning(
                    "%s; retrying in %.1f s, with at most %d attempts", reason, seconds, MAX_ATTEMPTS
                )
            if self._stop.wait(seconds):
                raise NoCaptionError("the run has ended")
        try:
            return self._request(body)
        except _RetryableError as error:
            text = f"{MAX_ATTEMPTS} requests failed, the last because {error.reason}"
            raise NoCaptionError(text, server_failed=True) from None

    def _make_body(self, prompt: str, frames: Frames) -> dict[str, Any]:
        """Return the JSON body of a chat completion request that sends frames and asks for a caption."""
        content: list[dict[str, Any]] = []
        for frame in frames:
            file = io.BytesIO()
            Image.fromarray(frame).save(file, "JPEG", quality=JPEG_QUALITY)
            encoded = base64.b64encode(file.getvalue()).decode("ascii")
            content.append({"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded}"}})
        content.append({"type": "text", "text": prompt})
        messages: list[dict[str, Any]] = []
        if self.ask_options.system_prompt:
            messages.append({"role": "system", "content": self.ask_options.system_prompt})
        messages.append({"role": "user", "content": content})
        body = {
            "model": self._model,
            "messages": messages,
            "max_tokens": self.ask_options.max_new_tokens,
            "temperature": self.ask_options.temperature,
        }
        # at temperature 0 the answer does not depend on a seed
        if self.ask_options.temperature:
            body["seed"] = self.ask_options.seed
        return body

    def _request(self, body: Mapping[str, Any]) -> str:
        """Send one caption request, and return the caption in the response."""
        # A request with a parameter that the model refuses is sent again without it, or with its replacement.
        parameters: dict[str, Any] = {}
        for key, value in body.items():
            name = PARAMETER_REPLACEMENTS[key] if key in self._refused_parameters else key
            if name is not None:
                parameters[name] = value
        try:
            response = self._post(parameters)
        except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
            raise self._explain_connection_error(error) from None
        self._has_answered = True
        if response.status == 200:
            return self._read_caption(response.text)
        if response.status == 400:  # may name a parameter that the model does not support
            refused = _find_refused_parameter(response.text, parameters)
            if refused is not None:
                self._leave_out(refused)
                return self._request(body)
        raise self._explain_status(response)

    def _explain_status(self, response: "_Response") -> Exception:
        """Return the exception for a response without a caption, as documented at `_request`."""
        status = response.status
        # OpenAI's JSON has a message, other servers answer with a text
        try:
            error = parse_json(response.text)["error"]
            error_text = str(error["message"] if isinstance(error, dict) else error)
        except (ValueError, LookupError, TypeError):
            error_text = response.text or "nothing more"
        message = self._redact(error_text)
        if status in RETRIED_STATUSES:
            return _RetryableError(f"the server answers {status}: {message}", response.wait_seconds)
        if status in FATAL_STATUSES:
            remedy = f"check {KEY_VARIABLE}" if self._key else f"set {KEY_VARIABLE}"
            if status == 404:
                remedy = "check --api_base and --api_model"
            return UserError(
                f"{self._address} answers {status}, {FATAL_STATUSES[status]}: {message}. "
                f"To fix this, {remedy}."
            )
        if 300 <= status < 400:
            return UserError(
                f"--api_base: {self._address} answers {status} and redirects to another address. Pass that "
                "one."
            )
        return NoCaptionError(f"the server answers {status}: {message}")

    def _explain_connection_error(self, error: BaseException) -> UserError | _RetryableError:
        """Return the exception for a failed connection: fatal only if the server has never answered."""
        cause = error
        while cause.__context__ is not None:  # the innermost error is the system's
            cause = cause.__context__
        reason = self._redact(getattr(cause, "strerror", None) or str(cause))
        is_rejected = isinstance(error, requests.ConnectTimeout) or isinstance(cause, _NO_SERVER)
        if is_rejected and not self._has_answered:
            return UserError(
                f"--api_base: nothing answers at {self._address}: {reason}. Start the server, or correct "
                "the address."
            )
        if isinstance(error, requests.Timeout) or isinstance(cause, TimeoutError):
            reason = f"there is no complete answer within {self.timeout:g} s (--api_timeout)"
        return _RetryableError(f"the connection broke: {reason}", wait_seconds=None)

    def _post(self, parameters: Any) -> "_Response":
        """Send a request, and read the whole response within the time limit."""
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
            if "," in answer.headers.get("Content-Encoding", ""):  # compressed twice, a few bytes can be GiB
                raise NoCaptionError("the server's answer is packed more than once")
            body = bytearray()
            end = start + self.timeout
            for piece in answer.iter_content(1):  # a larger piece would wait until it is full
                body += piece
                if time.monotonic() > end:  # requests restarts its own timeout at each byte
                    raise requests.ReadTimeout
                if len(body) > MAX_ANSWER_BYTES:
                    raise NoCaptionError(f"the server's answer is longer than {MAX_ANSWER_BYTES >> 20} MiB")
            wait_seconds = _read_wait_seconds(answer.headers.get("Retry-After"))
            return _Response(answer.status_code, wait_seconds, body.decode("utf-8", "replace"))

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add the API key to a request."""
        # This is passed as `auth`, because without it requests sends a password from the user's netrc file.
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _read_caption(self, text: str) -> str:
        """Extract the caption from a server's JSON response."""
        try:
            choice = parse_json(text)["choices"][0]
            content = choice["message"].get("content")
            # the answer reached the maximum number of tokens
            was_cut = choice.get("finish_reason") == "length"
        except (ValueError, LookupError, TypeError, AttributeError):
            raise NoCaptionError(
                f"the server's response has an unexpected format: {self._redact(text)!r}"
            ) from None
        if isinstance(content, list):  # some servers return parts
            part_texts = [part.get("text") for part in content if isinstance(part, dict)]
            content = " ".join(part for part in part_texts if isinstance(part, str))
        return parse_caption(content if isinstance(content, str) else "", was_cut)

    def _leave_out(self, name: str) -> None:
        """Stop sending a parameter, because the server refuses it."""
        if name in self._refused_parameters:  # another thread has recorded it
            return
        self._refused_parameters.add(name)
        replacement = PARAMETER_REPLACEMENTS[name]
        consequence = f"{replacement} is sent instead" if replacement else "its own is used"
        logger.warning("%s does not take %s: %s", self._model, name, consequence)

    def _redact(self, text: str) -> str:
        """Return a text in one line for messages, shortened and without the API key."""
        if self._key:
            text = text.replace(self._key, "(the key)")
        return shorten(" ".join(text.split()), 300)


class _Response(NamedTuple):
    """Status code and text of a response, and how long the server asks to wait; None if it does not say."""

    status: int
    wait_seconds: float | None
    text: str


def _read_wait_seconds(retry_after: str | None) -> float | None:
    """Return the seconds in a Retry-After header; None for a missing header, a date or other text."""
    try:
        seconds = float(retry_after or "nan")
    except ValueError:
        return None
    return seconds if seconds >= 0 else None


def _find_refused_parameter(error_text: str, parameters: Mapping[str, Any]) -> str | None:
    """Return the parameter of a request that an error message names in quotes; None without one."""
    for name in PARAMETER_REPLACEMENTS:
        if name in parameters and any(f"{quote}{name}{quote}" in error_text for quote in "'\"`"):
            return name
    return None
