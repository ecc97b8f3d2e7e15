"""Check before a launch on several nodes: all nodes are reachable, with equal software and inputs.

    python -m modern_llm.distributed.rendezvous.preflight --nodes 2 --node_rank 0 \\
        --main_address HOST --main_port PORT --config run.yaml

Launchers wait minutes for a missing node, and hardly report two nodes with one rank. This check
reports both within a minute, in one line, and also differences of packages, of the configuration
file, and of the local input files that it names.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from modern_llm.config.errors import status_of
from modern_llm.config.printable import one_line
from modern_llm.distributed.health.heartbeat import SLOWEST_DISK
from modern_llm.distributed.rendezvous.handshake import MEET_SECONDS, meet, open_store, versions
from modern_llm.distributed.rendezvous.input_files import bytes_in, content_of, named_in


def main(arguments: list[str] | None = None) -> int:
    """Check all nodes; return 0, or the exit status of the error."""
    parser = argparse.ArgumentParser(prog="meet_nodes", allow_abbrev=False)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--node_rank", type=int, required=True)
    parser.add_argument("--main_address", required=True)
    parser.add_argument("--main_port", type=int, required=True)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--seconds", type=float, default=MEET_SECONDS)
    asked, _ = parser.parse_known_args(arguments)
    try:
        if asked.nodes == 1:
            open_store("127.0.0.1", asked.main_port, serves=True, seconds=asked.seconds)
            return 0
        notes = _meet(asked)
    except Exception as error:
        if status_of(error) == 1:
            raise
        print(f"modern-llm: error: {one_line(error)}", file=sys.stderr, flush=True)
        return status_of(error)
    hosts = ", ".join(note["host"] for note in notes)
    print(f"{asked.nodes} nodes met: {one_line(hosts)}", file=sys.stderr, flush=True)
    return 0


def _meet(asked: argparse.Namespace) -> list[dict[str, Any]]:
    facts: dict[str, Any] = {"versions": versions()}
    values: Any = None
    if asked.config is not None:
        digest, values = content_of(asked.config)
        facts |= {"files": {asked.config.name: digest}, "bytes": bytes_in(values)}
    store = open_store(
        asked.main_address, asked.main_port, serves=asked.node_rank == 0, seconds=asked.seconds
    )

    def meeting(name: str, facts: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
        place = dist.PrefixStore(name, store)
        return meet(place, asked.node_rank, asked.nodes, facts, word="node", seconds=seconds)

    notes = meeting("nodes", facts, asked.seconds)
    if asked.config is not None:
        longest = max(note["bytes"] for note in notes) / SLOWEST_DISK
        files = {"files": named_in(values)}
        return meeting("files", files, asked.seconds + longest)
    return notes


if __name__ == "__main__":
    sys.exit(main())
