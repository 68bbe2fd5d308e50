"""Which slots of which hosts take part: the hostfile, the include/exclude filter and the world info made of them.

Vocabulary: a *pool* maps a host name to its number of slots (hostfile) or to the list of its slot ids (after
filtering). A slot is a device where there are devices, else a place for one rank. A *filter* is
`host[:slot,slot][@host...]`. Invariants: every result keeps the order of the hostfile; a host without slots is never
in a result; an unknown host or slot is an error. The world info is the pool as base64 of JSON, so that it passes
through any shell unquoted.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

Pool = dict[str, list[int]]

_LINE = re.compile(r"^(\S+)\s+slots\s*=\s*(\d+)$")


def parse_hostfile(lines: Iterable[str], name: str = "hostfile") -> dict[str, int]:
    """Hosts and their number of slots from lines `host slots=N`; whole-line `#` comments and blank lines are skipped.

    Raises ValueError, naming the line, for a malformed line, a host that appears twice or a file without hosts.
    """
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.match(text)
        if match is None:
            raise ValueError(
                f"{name}, line {number}: {text!r} is not of the form 'HOST slots=N', e.g. 'worker-1 slots=8'"
            )
        host, slots = match.group(1), int(match.group(2))
        if host in hosts:
            raise ValueError(
                f"{name}, line {number}: host {host!r} appears twice; give each host one line with all its slots"
            )
        hosts[host] = slots
    if not hosts:
        raise ValueError(f"{name}: no hosts in it; write one line 'HOST slots=N' per host")
    return hosts


def fetch_hostfile(hostfile_path: str | Path) -> dict[str, int] | None:
    """The parsed hostfile at `hostfile_path`, or None where there is no such file (the launch is then local)."""
    file = Path(hostfile_path)
    if not file.is_file():
        return None
    return parse_hostfile(file.read_text(encoding="utf-8").splitlines(), name=str(file))


def parse_filter(text: str) -> dict[str, list[int] | None]:
    """`host[:slot,slot][@host...]` as {host: slot ids, or None for all slots}. ValueError where it cannot be read."""
    wanted: dict[str, list[int] | None] = {}
    for part in text.split("@"):
        host, colon, slots = part.strip().partition(":")
        if not host:
            raise ValueError(f"filter {text!r}: an empty host name; expected HOST[:SLOT,SLOT][@HOST...]")
        if host in wanted:
            raise ValueError(f"filter {text!r}: host {host!r} appears twice; list its slots once, e.g. {host}:0,1")
        if not colon:
            wanted[host] = None
            continue
        ids = [piece.strip() for piece in slots.split(",")]
        if not all(piece.isdigit() for piece in ids):
            raise ValueError(f"filter {text!r}: slots of {host!r} must be numbers such as {host}:0,2, not {slots!r}")
        wanted[host] = [int(piece) for piece in ids]
    return wanted


def parse_resource_filter(host_info: Mapping[str, Sequence[int]], include_str: str = "", exclude_str: str = "") -> Pool:
    """The slots of `host_info` that an include or an exclude filter (never both) leaves, in the order of `host_info`.

    Raises ValueError for both filters at once, an unknown host or slot, and a result without any slot.
    """
    if include_str and exclude_str:
        raise ValueError(
            f"--include {include_str!r} and --exclude {exclude_str!r} exclude each other; give one of them"
        )
    chosen = include_str or exclude_str
    wanted = parse_filter(chosen) if chosen else {}
    for host, asked in wanted.items():
        if host not in host_info:
            raise ValueError(f"filter {chosen!r}: unknown host {host!r}; known: {', '.join(host_info)}")
        unknown = [slot for slot in asked or () if slot not in host_info[host]]
        if unknown:
            known = ",".join(map(str, host_info[host])) or "none"
            raise ValueError(f"filter {chosen!r}: host {host!r} has no slot {unknown[0]}; its slots: {known}")
    pool: Pool = {}
    for host, slots in host_info.items():
        named = wanted.get(host, [])
        hit = set(slots) if named is None else set(named)  # None: the whole host
        if not chosen:
            pool[host] = list(slots)
        elif include_str:
            pool[host] = [slot for slot in slots if slot in hit]
        else:
            pool[host] = [slot for slot in slots if slot not in hit]
    pool = {host: slots for host, slots in pool.items() if slots}
    if not pool:
        what = f"filter {chosen!r} leaves" if chosen else "the hosts have"
        raise ValueError(
            f"{what} no slot to run on; known: {', '.join(f'{h}:{list(s)}' for h, s in host_info.items())}"
        )
    return pool


def parse_inclusion_exclusion(resource_pool: Mapping[str, int], inclusion: str, exclusion: str) -> Pool:
    """`parse_resource_filter` for a pool of slot counts, as `fetch_hostfile` returns it."""
    return parse_resource_filter({host: range(count) for host, count in resource_pool.items()}, inclusion, exclusion)


def limit_pool(pool: Mapping[str, Sequence[int]], num_nodes: int = -1, num_slots: int = -1) -> Pool:
    """The first `num_nodes` hosts, each with slots 0..`num_slots`-1; -1 leaves either as it is."""
    hosts = list(pool)
    if num_nodes == 0 or num_nodes < -1 or num_nodes > len(hosts):
        raise ValueError(
            f"--num_nodes {num_nodes}: expected 1 to {len(hosts)}, the number of hosts ({', '.join(hosts)})"
        )
    if num_slots == 0 or num_slots < -1:
        raise ValueError(f"--num_gpus {num_slots}: expected at least 1")
    if num_nodes > 0:
        hosts = hosts[:num_nodes]
    return {host: list(range(num_slots)) if num_slots > 0 else list(pool[host]) for host in hosts}


def encode_world_info(world_info: Mapping[str, Sequence[int]]) -> str:
    """The pool as base64 (URL alphabet) of JSON {host: [slot ids]}."""
    text = json.dumps({host: list(slots) for host, slots in world_info.items()})
    return base64.urlsafe_b64encode(text.encode()).decode()


def decode_world_info(text: str) -> Pool:
    """The inverse of `encode_world_info`. ValueError where the text is not one."""
    try:
        data = json.loads(base64.urlsafe_b64decode(text.encode()))
        return {str(host): [int(slot) for slot in slots] for host, slots in data.items()}
    except (binascii.Error, UnicodeError, json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"--world_info {text[:60]!r} is not base64 of JSON {{host: [slots]}}: {error}") from error
