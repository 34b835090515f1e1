"""Takes the address of a server before anything is loaded."""

from __future__ import annotations

import errno
import os
import socket

_BUSY, _FORBIDDEN = errno.EADDRINUSE, (errno.EACCES, errno.EPERM)


def bound(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to all addresses of a host, not yet listening; port 0 takes a free one, the same for all.

    Raises:
        OSError: the host is none of this machine, or the port is taken or may not be had.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise OSError(f"--host must be an address of this machine, got {host}: {error.strerror}.") from None
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            try:
                made = socket.socket(family, kind, protocol)
            except OSError:  # IPv6 is switched off
                continue
            sockets.append(made)
            if os.name == "posix":  # elsewhere it would share the port
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind((address[0], port, *address[2:]))
            port = made.getsockname()[1]
    except OSError as error:
        for made in sockets:
            made.close()
        raise OSError(_refusal(error, host, port)) from None
    return sockets


def _refusal(error: OSError, host: str, port: int) -> str:
    if error.errno == _BUSY:
        return f"--port must be free, got {port}, where another program listens on {host}. Choose another, or 0 for a free one."
    if error.errno in _FORBIDDEN:
        return f"--port must be one that this user may take, got {port}. Choose one from 1024 on, or 0 for a free one."
    return f"--host must be an address of this machine, got {host}: {error.strerror}."
