"""Adapter files at https addresses: downloaded once, kept in the cache, asked for again only if they changed."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from huggingface_hub import constants

from tav_peft.errors import AdapterError
from tav_peft.whole import whole

LIMIT = 4_000_000_000  # bytes; a dense adapter of SDXL in fp32 stays below
_LONGEST_HEADER = 100_000_000  # of a safetensors file
_TIMEOUT = 30  # seconds without an answer
_AT_ONCE = 1 << 20
_LOCAL = {"localhost", "127.0.0.1", "::1"}
_VALIDATORS = {"ETag": "If-None-Match", "Last-Modified": "If-Modified-Since"}  # RFC 9110, 13.1
_SEEN = "seen.json"

_LOG = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Give the folder of downloaded files: tav-peft in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tav-peft"


def download(address: str) -> Path:
    """Give the file at an https address (http on this machine only), from the cache where it has not changed.

    What is kept is a whole safetensors file of at most 4 GB, in a folder named by the address's SHA-256. Without a
    network, or with HF_HUB_OFFLINE=1, a file that was downloaded before is taken as it is.

    Raises:
        AdapterError: when there is no such file, it is none that can be read, or the network is needed and not there.

    """
    _check_scheme(address)
    place = cache_folder() / hashlib.sha256(address.encode()).hexdigest()
    kept = next(iter(sorted(place.glob("*.safetensors"))), None)
    if constants.HF_HUB_OFFLINE:
        if kept is None:
            raise AdapterError(
                f"{_shown(address)} is not in the cache, and HF_HUB_OFFLINE forbids to download it. Unset it once."
            )
        return kept
    request = Request(address, headers={"User-Agent": "tav-peft", **(_conditions(place) if kept else {})})
    try:
        with build_opener(_Redirects()).open(request, timeout=_TIMEOUT) as answer:
            return _keep(answer, address, place)
    except HTTPError as error:
        if kept is not None and (error.code == http.client.NOT_MODIFIED or error.code >= 500):
            return kept
        raise AdapterError(_refusal(address, error.code)) from None
    except (OSError, http.client.HTTPException) as error:
        if kept is not None:
            _LOG.warning("%s cannot be reached; it is taken from the cache.", _shown(address))
            return kept
        reason = getattr(error, "reason", None) if isinstance(error, URLError) else error
        raise AdapterError(
            f"{_shown(address)} cannot be reached ({reason}) and is not in the cache. Check the network, or give a file."
        ) from None


class _Redirects(HTTPRedirectHandler):
    """Follows redirects, but never from https to http."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(req.full_url).scheme == "https" and urlsplit(newurl).scheme != "https":
            raise AdapterError(
                f"{_shown(req.full_url)} leads to an address without https. It is not followed."
            )
        _check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_scheme(address: str) -> None:
    parts = urlsplit(address)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOCAL):
        raise AdapterError(f"{_shown(address)} is not encrypted on its way. Give an https address.")


def _conditions(place: Path) -> dict[str, str]:
    """Ask only for a file that is another than the one seen."""
    try:
        seen = json.loads((place / _SEEN).read_text(encoding="utf-8"))
        return {_VALIDATORS[name]: str(value) for name, value in seen.items() if name in _VALIDATORS}
    except (OSError, ValueError, AttributeError):
        return {}


def _keep(answer: Any, address: str, place: Path) -> Path:
    """Write what is answered into the cache, if it is a whole safetensors file."""
    # brings torch, which a name on the hub does without
    from tav_peft.tensor_file import FileTensors

    told = answer.headers.get("Content-Length") or ""
    size = int(told) if told.isdecimal() else None
    if size is not None and size > LIMIT:
        raise AdapterError(_too_large(address))
    name = _file_name(address)
    _LOG.warning("Downloading %s (%s).", _shown(address), "size unknown" if size is None else size_text(size))
    with whole(place, AdapterError) as part:
        part.mkdir()
        with (part / name).open("wb") as file:
            for piece in _pieces(answer, address, size):
                file.write(piece)
        FileTensors(part / name)
        seen = {each: value for each in _VALIDATORS if (value := answer.headers.get(each))}
        (part / _SEEN).write_text(json.dumps(seen), encoding="utf-8")
    return place / name


def _pieces(answer: Any, address: str, size: int | None) -> Iterator[bytes]:
    """Give the answer's bytes, refusing what does not begin like safetensors, is too long or ends too early."""
    count = 0
    while True:
        try:
            piece = answer.read(_AT_ONCE)
        except (OSError, http.client.HTTPException) as error:
            raise AdapterError(f"{_shown(address)}: the download broke off ({error}). Try again.") from None
        if not piece and count:
            break
        if not count:
            _check_beginning(piece, address)
        count += len(piece)
        if count > LIMIT:
            raise AdapterError(_too_large(address))
        yield piece
    if size is not None and count != size:
        raise AdapterError(f"{_shown(address)}: {count} of {size} bytes came. Try again.")


def _check_beginning(piece: bytes, address: str) -> None:
    length = struct.unpack("<Q", piece[:8])[0] if len(piece) > 8 else 0
    if not 2 <= length <= _LONGEST_HEADER or piece[8:9] != b"{":
        advice = "Only safetensors files are read; a pickle is not."
        if piece.lstrip()[:1] == b"<":
            advice = "It is a web page. Give the address of the file itself"
            advice += ", with /resolve/ for /blob/." if "/blob/" in address else "."
        raise AdapterError(f"{_shown(address)} is no adapter file. {advice}")


def _refusal(address: str, code: int) -> str:
    if code in (http.client.NOT_FOUND, http.client.GONE):
        return f"There is no file at {_shown(address)} ({code}). Check the address."
    if code in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
        return f"{_shown(address)} may not be read by everybody ({code}). Download it by hand, and give the file."
    return f"{_shown(address)} is refused with status {code}. Try again later, or give a file."


def _too_large(address: str) -> str:
    return f"{_shown(address)} is larger than {size_text(LIMIT)}, more than any adapter. Download it by hand if it is."


def _file_name(address: str) -> str:
    """Name the file as its address does, for what is named after it; only letters, digits, dots and dashes."""
    name = PurePosixPath(unquote(urlsplit(address).path)).name.removesuffix(".safetensors")
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('.-')[:80] or 'adapter'}.safetensors"


def _shown(address: str) -> str:
    """Show an address without what may be secret in it: its query."""
    return address.partition("?")[0].partition("#")[0]


def size_text(count: int) -> str:
    """Spell a number of bytes in kB or MB."""
    return f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:,.1f} MB"
