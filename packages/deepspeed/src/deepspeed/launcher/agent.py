"""torch's elastic agent over `RankProcesses`: the nodes meet in a store, get their ranks, run, and end together.

The agent (`SimpleElasticAgent`) owns the sequence: rendezvous, rank assignment, start, monitor, stop, exit barrier.
This module supplies the two parts that it leaves open: `WorldRendezvous`, a fixed set of nodes around one TCP store,
and `RankAgent`, which starts and watches processes. Invariants: the store is bound before its port is told to anyone
(with port 0 it is any free one), and the ranks use the same store; ranks are numbered as `LaunchSpec` says; a node
that fails writes so into the store, and every other node stops its ranks within about a second; a node whose ranks
are done stays until all are. This is the only launcher module that needs torch.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from deepspeed.launcher.devices import Devices
from deepspeed.launcher.ports import port_message
from deepspeed.launcher.processes import FAILURE_GRACE, SIGNAL_GRACE, Outcome, RankProcesses
from deepspeed.launcher.report import first_failure, one_line
from deepspeed.launcher.signals import SignalInbox
from deepspeed.launcher.spec import LaunchSpec, plan_node

logger = logging.getLogger("deepspeed.launcher")

JOIN_TIMEOUT = 900.0
"""Seconds the nodes wait for each other at the start."""
_ATTEMPT_SECONDS = 5.0
"""Seconds that one attempt to connect to node 0 may take; between attempts signals are looked for."""
_MONITOR_INTERVAL = 0.05
_STORE_INTERVAL = 0.5
_FAILED_KEY = "deepspeed/failed"
_DONE_KEY = "deepspeed/done"


class WorldRendezvous(RendezvousHandler):
    """The nodes of a spec meet at the TCP store of node 0. They are known beforehand; none joins later."""

    def __init__(self, spec: LaunchSpec, inbox: SignalInbox) -> None:
        self._spec = spec
        self._inbox = inbox
        self.store: Store | None = None
        self.port = spec.master_port
        """The port of the store; known once it is bound."""

    def get_backend(self) -> str:
        """The name that the agent records."""
        return "deepspeed"

    @property
    def use_agent_store(self) -> bool:
        """The ranks connect to this store instead of making one."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Binds (node 0) or connects, and waits until all nodes are here.

        Raises RuntimeError for a taken port, TimeoutError naming missing nodes, SignalException after a signal.
        """
        spec = self._spec
        deadline = time.monotonic() + JOIN_TIMEOUT
        tcp_store = self._connect(deadline)
        self.store = PrefixStore("deepspeed_launcher", tcp_store)
        self.port = tcp_store.port
        self._wait_for_nodes(self.store, deadline)
        address = RendezvousStoreInfo(spec.master_addr, self.port)
        return RendezvousInfo(self.store, spec.node_rank, len(spec.world), address)

    def is_closed(self) -> bool:
        """Never: there is one rendezvous."""
        return False

    def set_closed(self) -> None:
        """Nothing to close."""

    def num_nodes_waiting(self) -> int:
        """Always 0: nobody joins later."""
        return 0

    def get_run_id(self) -> str:
        """One launch, one store: a constant is unique."""
        return "deepspeed"

    def shutdown(self) -> bool:
        """The store ends with this process."""
        return True

    def _connect(self, deadline: float) -> TCPStore:
        spec = self._spec
        while True:
            self.look_for_signals()
            try:
                store = TCPStore(
                    spec.master_addr,
                    spec.master_port,
                    is_master=spec.node_rank == 0,
                    timeout=datetime.timedelta(seconds=_ATTEMPT_SECONDS),
                    wait_for_workers=False,
                )
            except DistError as error:
                if spec.node_rank == 0:
                    raise RuntimeError(port_message(spec.master_port, error)) from error
                if time.monotonic() > deadline:
                    where = f"{spec.master_addr}:{spec.master_port} (node 0, {spec.hosts[0]})"
                    raise TimeoutError(
                        f"no launcher answered at {where} within {JOIN_TIMEOUT:.0f} s: {error}"
                    ) from error
            else:
                store.set_timeout(datetime.timedelta(seconds=JOIN_TIMEOUT))
                return store

    def _wait_for_nodes(self, store: Store, deadline: float) -> None:
        keys = [f"deepspeed/node/{node_rank}" for node_rank in range(len(self._spec.world))]
        store.set(keys[self._spec.node_rank], "here")
        while not store.check(keys):
            self.look_for_signals()
            if time.monotonic() > deadline:
                hosts = [host for host, key in zip(self._spec.hosts, keys, strict=True) if not store.check([key])]
                raise TimeoutError(
                    f"no launcher on {', '.join(hosts)} joined within {JOIN_TIMEOUT:.0f} s; is it running there?"
                )
            time.sleep(_MONITOR_INTERVAL)

    def look_for_signals(self) -> None:
        """Raises SignalException once the launcher has got a signal."""
        if self._inbox.first is not None:
            raise SignalException(f"the launcher got {self._inbox.first.name}", sigval=self._inbox.first)


class RankAgent(SimpleElasticAgent):
    """Runs this node's ranks; `outcomes` and `remote_failure` tell how it went."""

    def __init__(self, spec: LaunchSpec, devices: Devices, inbox: SignalInbox) -> None:
        self._launch = spec
        self._devices = devices
        self._inbox = inbox
        self._rendezvous_handler = WorldRendezvous(spec, inbox)
        super().__init__(
            WorkerSpec(
                role="default",
                local_world_size=len(spec.world[spec.hosts[spec.node_rank]]),
                rdzv_handler=self._rendezvous_handler,
                entrypoint=spec.program.script,
                max_restarts=0,
                monitor_interval=_MONITOR_INTERVAL,
            )
        )
        self.processes: RankProcesses | None = None
        self.outcomes: list[Outcome] = []
        self.remote_failure: dict[str, Any] | None = None
        """What another node wrote when it failed: host, rank, exit_code, text."""
        self._next_look = 0.0
        self._said_done = False
        self._nodes_done = 0

    def stop_ranks(self, death_signal: signal.Signals = signal.SIGTERM, grace: float = FAILURE_GRACE) -> None:
        """Ends all ranks of this node and collects how they ended."""
        if self.processes is not None:
            self.processes.stop(death_signal, grace, hurry=self._inbox.impatient)
            if not self.outcomes:
                self.outcomes = self.processes.outcomes()

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        spec = dataclasses.replace(self._launch, master_port=self._rendezvous_handler.port)
        plans = plan_node(spec, spec.node_rank, self._devices, os.environ)
        elastic = {
            "GROUP_RANK": str(spec.node_rank),
            "GROUP_WORLD_SIZE": str(len(spec.world)),
            "ROLE_NAME": "default",
            "ROLE_WORLD_SIZE": str(spec.world_size),
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
            "TORCHELASTIC_RUN_ID": self._rendezvous_handler.get_run_id(),
            "TORCHELASTIC_USE_AGENT_STORE": str(self._rendezvous_handler.use_agent_store),
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        }
        plans = [dataclasses.replace(plan, env={**elastic, "ROLE_RANK": str(plan.rank), **plan.env}) for plan in plans]
        pid_file = Path(tempfile.gettempdir()) / f"{spec.save_pid}.deepspeed" if spec.save_pid else None
        self.processes = RankProcesses(plans, spec.log_dir, pid_file)
        self.processes.start()
        return {plan.local_rank: self.processes.pids()[plan.rank] for plan in plans}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        processes = self.processes
        assert processes is not None
        self._rendezvous_handler.look_for_signals()
        all_ended = processes.poll()
        if processes.failed():
            processes.settle()
            self.stop_ranks()
            self._tell_failure()
            return RunResult(state=WorkerState.FAILED)
        self._look_at_other_nodes(all_ended)
        if self.remote_failure is not None:
            self.stop_ranks()
            return RunResult(state=WorkerState.FAILED)
        if self._nodes_done == len(self._launch.world):
            self.stop_ranks()
            return RunResult(
                state=WorkerState.SUCCEEDED, return_values=dict.fromkeys(plan.rank for plan in processes.plans)
            )
        return RunResult(state=WorkerState.HEALTHY)

    def _look_at_other_nodes(self, all_ended: bool) -> None:
        """Tells the store when this node is done, and now and then reads from it how many are, or that one failed."""
        if len(self._launch.world) == 1:
            self._nodes_done = int(all_ended)
            return
        now = time.monotonic()
        if now < self._next_look and all_ended == self._said_done:
            return
        self._next_look = now + _STORE_INTERVAL
        store = self._rendezvous_handler.store
        assert store is not None
        try:
            if store.check([_FAILED_KEY]):
                self.remote_failure = json.loads(store.get(_FAILED_KEY))
                return
            self._nodes_done = store.add(_DONE_KEY, int(all_ended and not self._said_done))
            self._said_done = all_ended
        except (DistError, RuntimeError) as error:
            host = self._launch.hosts[0]
            text = f"its launcher is gone ({error})"
            self.remote_failure = {"host": host, "rank": 0, "exit_code": 1, "text": text}

    def _tell_failure(self) -> None:
        """Lets the other nodes know; the first one to write wins."""
        first = first_failure(self.outcomes)
        store = self._rendezvous_handler.store
        if first is None or store is None or len(self._launch.world) == 1:
            return
        failure = {
            "host": first.plan.host,
            "rank": first.plan.rank,
            "exit_code": first.exit_code,
            "text": one_line(first),
        }
        try:
            store.compare_set(_FAILED_KEY, "", json.dumps(failure))
            if self._launch.node_rank == 0:
                time.sleep(2 * _STORE_INTERVAL)  # the store ends with this process: let the others read it
        except (DistError, RuntimeError):
            return  # the store has gone with node 0, which is how the others learn of it

    def _stop_workers(self, worker_group: WorkerGroup, *_: Any, **__: Any) -> None:
        self.stop_ranks()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, *_: Any, **__: Any) -> None:
        if self._inbox.first is not None:
            logger.warning("%s: passed on to the ranks; send it again to end them at once", self._inbox.first.name)
        self.stop_ranks(death_sig, SIGNAL_GRACE)
