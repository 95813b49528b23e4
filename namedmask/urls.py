# SPDX-License-Identifier: MIT
"""URLs: what may be opened, and what must not be written anywhere."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

# Brackets, apostrophes and punctuation are legal in a URL; at its end they belong to the text.
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"<>]*[^\s\"<>)\]'.,:;]")
_SECRET = re.compile(  # names of parameters that carry a signature, a key or a password, or change with it
    r"(x-(amz|goog|oss|ms|cos|obs|tos)-.*|(.*[-_])?(sig(n|nature)?|sas|pass|passphrase|passcode|pwd)"
    r"|.*(token|auth|secret|passw|credential|hmac|jwt|bearer|hdnt|hdnea).*"
    r"|(.*([-_]|api|access|private|account|storage|subscription|resource|rl))?key([-_]?(pair[-_]?)?id)?"
    r"|.*sess(ion)?[-_]?id|policy|expires|googleaccessid)",
    re.IGNORECASE,
)
_KEY_AS_CODE = re.compile(r"code=.{36,}", re.IGNORECASE)  # of Azure Functions; a shorter code may name a photo
_AZURE = {"se", "sp", "sv", "sr", "st", "spr", "skoid", "sktid", "skt", "ske", "sks", "skv", "sip", "ss", "srt"}
_LOCAL = {"file", "local", "dir"}
# What a list that is itself at a URL may name.
_NETWORK = {
    *("http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "oss", "oci"),
    *("ftp", "sftp", "hdfs", "webhdfs"),
}
_CONTAINERS = {"abfs", "abfss", "wasb", "wasbs"}  # container@account


def is_url(path: str) -> bool:
    """Whether a path is a URL."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def protocol_of(url: str) -> str:
    """The protocol of a URL, in lower case."""
    return url.partition("://")[0].lower()


def path_part(path: str) -> str:
    """A URL without its query; a path as it is."""
    return path.partition("?")[0] if is_url(path) else path


def clean_url(url: str) -> str:
    """A URL without user name, password and the parameters of a signature, which must not be written anywhere.

    Other parameters stay, as they may tell photos apart. The query of a tar is dropped whole, so that names of its
    members can follow.
    """
    protocol, _, rest = url.partition("://")
    if protocol.lower() in ("http", "https"):
        rest = rest.partition("#")[0]
    rest, _, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    if protocol.lower() not in _CONTAINERS or ":" in authority.partition("@")[0]:
        authority = authority.rpartition("@")[2]
    path = authority + slash + path
    if path.lower().endswith(".tar"):
        query = ""
    parts = query.split("&")
    names = [part.partition("=")[0] for part in parts]
    signed = "sig" in map(str.lower, names)
    kept = [
        part
        for part, name in zip(parts, names, strict=True)
        if part
        and not _SECRET.fullmatch(name)
        and not _KEY_AS_CODE.fullmatch(part)
        and not (signed and name.lower() in _AZURE)
    ]
    return f"{protocol}://{path}" + ("?" + "&".join(kept) if kept else "")


def url_problem(url: str, remote_list: bool = False) -> str | None:
    """Why a URL is not read; None if it is. Nothing is requested.

    Args:
        url: The URL.
        remote_list: It stands in a list that is at a URL, which may not name files of this machine.
    """
    protocol = protocol_of(url)
    if protocol in _LOCAL or (remote_list and protocol not in _NETWORK):
        return f"{protocol}:// is not read" + (" from a list at a URL" if remote_list else ": write the path alone")
    if "::" in url.partition("?")[0]:
        return "chained URLs are not read"
    try:
        user = urlsplit(url).netloc.rpartition("@")[0]
    except ValueError:
        return "not a valid URL"
    if user and (protocol not in _CONTAINERS or ":" in user):
        return (
            "the URL holds a user name or password: leave them out, and give them to fsspec (in its configuration or "
            "in environment variables)"
        )
    return None


def without_secrets(text: str) -> str:
    """A text with the URLs in it as `clean_url` writes them, without their queries."""
    return _URL_IN_TEXT.sub(lambda url: path_part(clean_url(url[0])), text)
