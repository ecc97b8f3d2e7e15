"""A network interface by which gloo cannot reach other machines is one line before the start."""

from __future__ import annotations

import socket

import pytest

from modern_llm.config.errors import UserError
from modern_llm.distributed.rendezvous import interfaces


@pytest.fixture
def two_machines(monkeypatch):
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "ib0"), (3, "eth0")])
    monkeypatch.setattr(socket, "gethostname", lambda: "node-a")
    addresses = {"node-a": "127.0.1.1", "10.0.0.1": "10.0.0.1", "localhost": "127.0.0.1"}
    monkeypatch.setattr(socket, "gethostbyname", addresses.__getitem__)
    for name, value in {
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "10.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(interfaces.NAME, raising=False)
    return addresses


def test_a_name_that_leads_to_itself_is_refused_with_the_interfaces(two_machines):
    with pytest.raises(UserError, match=r"not set.*node-a.*towards 10\.0\.0\.1.*has ib0, eth0"):
        interfaces.check_interface()


def test_an_interface_that_does_not_exist_is_refused(two_machines, monkeypatch):
    monkeypatch.setenv(interfaces.NAME, "eth0,eth7")
    with pytest.raises(UserError, match="GLOO_SOCKET_IFNAME eth7: .* it has ib0, eth0"):
        interfaces.check_interface()


@pytest.mark.parametrize(
    "changes",
    [
        {"GLOO_SOCKET_IFNAME": "ib0"},
        {"LOCAL_WORLD_SIZE": "16"},
        {"MASTER_ADDR": "localhost"},
        {"node-a": "10.0.0.1"},
    ],
)
def test_one_machine_and_reachable_machines_pass(changes, two_machines, monkeypatch):
    for name, value in changes.items():
        if name in two_machines:
            two_machines[name] = value
        else:
            monkeypatch.setenv(name, value)
    interfaces.check_interface()
