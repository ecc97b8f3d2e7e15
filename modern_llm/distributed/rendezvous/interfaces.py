"""Check of the network interface of gloo, by which ranks agree, before processes connect.

Ranks agree through gloo on GPUs too: whether to stop, and background saves. On several machines a
wrong interface shows only as a connection that never comes.
"""

from __future__ import annotations

import ipaddress
import os
import socket

from modern_llm.config.errors import UserError

NAME = "GLOO_SOCKET_IFNAME"


def check_interface() -> None:
    """Raise `UserError` if gloo cannot reach other machines from here; nothing on one machine."""
    world, here = os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE", "")
    main = os.environ.get("MASTER_ADDR", "localhost")
    if not here or world == here or is_loopback(main):
        return
    known = [name for _, name in socket.if_nameindex()]
    others = ", ".join(name for name in known if name != "lo") or "none"
    chosen = os.environ.get(NAME, "")
    if missing := [name for name in chosen.split(",") if name and name not in known]:
        raise UserError(
            f"{NAME} {missing[0]}: this machine has no such network interface; it has {others}"
        )
    host = socket.gethostname()
    if not chosen and is_loopback(host):
        raise UserError(
            f"{NAME} is not set, and the name of this machine, {host}, leads to itself, where "
            f"others cannot reach it: set {NAME} to the interface towards {main} (this machine "
            f"has {others}); ranks agree through gloo on GPUs too"
        )


def is_loopback(host: str) -> bool:
    """Whether a name or address leads to this machine alone, or to nothing."""
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except OSError:
        return True
