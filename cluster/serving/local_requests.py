"""Refuses what a stranger's web page has a browser send to a server without a key.

A page may point a name of its own at 127.0.0.1 (DNS rebinding), and then reads answers as if they were its own site's;
only the headers Host and Origin tell. With a key no check is needed, since the page does not have it.
"""

import re
from urllib.parse import urlsplit

from aiohttp import web

from lockstep.cluster.serving.bind import is_local
from lockstep.cluster.serving.errors import Refused

_HOST = re.compile(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[^\s:@/\[\]]+))(?::(?P<port>[0-9]{1,5}))?", re.IGNORECASE)

_REMEDY = "address the server as localhost with its port, or give it a key with --api-key"


def check_local(request: web.Request) -> None:
    """Check that a request names this machine in Host, and comes from no other site's page.

    Raises:
        Refused: with status 403.
    """
    port = request.get_extra_info("sockname", ("", 0))[1]
    hosts = request.headers.getall("Host", [])
    if len(hosts) != 1 or not names_this(hosts[0], port):
        given = f"the header Host is {hosts[0][:80]!r}" if hosts else "the header Host is missing"
        raise Refused(403, f"{given}, and a server without a key answers its own machine: {_REMEDY}", code="wrong_host")
    origin = request.headers.get("Origin")
    if origin is not None and not is_local_origin(origin):
        raise Refused(
            403, f"pages of {origin[:80]!r} may not ask a server without a key: {_REMEDY}", code="wrong_origin"
        )


def names_this(host: str, port: int) -> bool:
    """Whether a Host header names a loopback address or localhost, with this port; without one it means 80."""
    found = _HOST.fullmatch(host)
    return found is not None and is_local(found["v6"] or found["name"]) and int(found["port"] or 80) == port


def is_local_origin(origin: str) -> bool:
    """Whether an Origin header names a page that this machine serves, on any port."""
    try:
        parts = urlsplit(origin)
        return parts.scheme in ("http", "https") and is_local(parts.hostname or "")
    except ValueError:
        return False
