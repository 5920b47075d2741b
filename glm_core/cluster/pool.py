"""The workers of a job on Ray: the connection, who gets how much of which node, and what becomes of each worker."""

from __future__ import annotations

import importlib
import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import batch
from ..errors import GLMError
from ..jobs import Job, JobStore, StopSignal, process_alive, this_process
from ..settings import REPOSITORY
from ..threads import usable
from . import RAY
from .scheduling import Died, Event, Opened, Refused, Report, Rows, Scheduler
from .worker import Worker, versions

CONNECT_S = 5.0
# Ray's workers stand behind everything else on a machine (niceness 15): beside other work on two cores a job had two
# thirds of the speed it had without Ray.
OWN_CLUSTER = {"worker_niceness": 0}
STORE_BYTES = 128 << 20  # of a cluster of our own: rows and answers are small
# What Ray puts behind its folder, at most, for a socket whose whole name must fit into 107 bytes.
SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1"
LONGEST_SOCKET = 107
KILLED = "Its process was ended from outside, as the system does when memory runs out."
MINE = "glm-ray-"  # begin of the name of a folder of Ray that is ours


@dataclass(frozen=True)
class Node:
    """A machine of the cluster as Ray counts it."""

    name: str
    cpus: float
    gpus: float = 0.0


def work(job: Job, store: JobStore, stop: StopSignal) -> None:
    """Do the open rows of a job on the cluster its task names, in a process that may end with the cluster."""
    task = job.task
    address, device = str(task.get("address") or ""), str(task.get("device") or "cpu")
    gpus = len([one for one in device.split(",") if one.startswith("cuda")])
    name = Path(str(task["checkpoint"])).name
    store.update(job.id, "Connecting to the cluster" if address else "Starting Ray on this machine")
    with _connected(job, address, gpus) as ray:
        nodes = [
            Node(str(one.get("NodeManagerHostname") or one.get("NodeManagerAddress")), *_size(one))
            for one in ray.nodes()
            if one.get("Alive", one.get("alive"))
        ]
        workers, cpus = shares(
            nodes, int(task.get("workers") or 0), float(task.get("cpus_per_worker") or 0), gpus
        )
        # Inside a worker its GPUs are numbered anew.
        here = device if not gpus else "cuda" if gpus == 1 else ",".join(f"cuda:{i}" for i in range(gpus))
        pool = RayPool(ray, job, workers, cpus, gpus, here, bool(address))
        store.update(job.id, f"Loading {name}; workers: {workers}, nodes: {len(nodes)}")
        used = batch.Template(str(task["template"]), list(task["columns"])).used
        # Without a temperature the same question has the same answer; a classification never has one.
        once = not (task.get("settings") or {}).get("temperature")
        Scheduler(job, store, stop, pool, workers, used, once, versions()).run()


def _size(node: Mapping[str, Any]) -> tuple[float, float]:
    has = node.get("Resources") or {}
    return float(has.get("CPU", 0)), float(has.get("GPU", 0))


def shares(nodes: Sequence[Node], workers: int, cpus: float, gpus: int) -> tuple[int, float]:
    """(how many workers, CPUs of each); 0 in the request is for as many as fit, and for an equal share.

    gpus   that each worker takes
    By default there is one worker per GPU, and without GPUs one per node. GLMError where a worker fits no node.
    """
    able = [node for node in nodes if node.cpus >= 1 and node.gpus >= gpus]
    if not able:
        raise GLMError(
            f"A worker with {gpus} GPUs fits no node of the cluster; it has {_listed(nodes)}.",
            "Add a node with a GPU, or choose another device.",
        )

    def room(share: float) -> int:
        return sum(min(int(node.cpus // share), int(node.gpus // gpus) if gpus else 1 << 30) for node in able)

    if not cpus:
        slots = sum(int(node.gpus // gpus) for node in able) if gpus else len(able)
        wanted = workers or slots
        # The largest whole number of CPUs with which all of them have room.
        most = int(max(node.cpus for node in able))
        cpus = float(next((one for one in range(most, 0, -1) if room(one) >= wanted), 1))
    if not (fits := room(cpus)):
        raise GLMError(
            f"A worker with {cpus:g} CPUs fits no node of the cluster; it has {_listed(nodes)}.",
            "Choose fewer CPUs per worker.",
        )
    return workers or fits, cpus


def _listed(nodes: Sequence[Node]) -> str:
    return ", ".join(f"{one.name} ({one.cpus:g} CPUs, {one.gpus:g} GPUs)" for one in nodes) or "no nodes"


# ---- the connection


@contextmanager
def _connected(job: Job, address: str, gpus: int) -> Iterator[Any]:
    """Ray, connected to a cluster, or to one of its own that ends with the block; GLMError where it is not there."""
    # No reports to its makers, neither from here nor from the processes it starts.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    common: dict[str, Any] = {"namespace": job.id, "log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        _knock(address)
        ray = importlib.import_module(RAY)
        # The nodes get this very program; its packages and the checkpoint they have to have.
        shipped = {"py_modules": [str(REPOSITORY / "glm_core")], "excludes": ["**/__pycache__"]}
        with _explained(address):
            ray.init(address=address, runtime_env=shipped, **common)
        try:
            yield ray
        finally:
            ray.shutdown()
        return
    # Its ports are open to the network; nobody without this word gets past them.
    os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
    ray = importlib.import_module(RAY)
    with _folder(job) as folder, _explained(""):
        ray.init(
            num_cpus=usable(), num_gpus=_gpus() if gpus else 0, include_dashboard=False, _temp_dir=str(folder),
            object_store_memory=STORE_BYTES, _system_config=OWN_CLUSTER, **common,
        )  # fmt: skip
        try:
            yield ray
        finally:
            ray.shutdown()


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """What Ray raises when it does not start or connect, as a sentence."""
    try:
        yield
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if address:
            raise GLMError(
                f"There is no connection to the Ray cluster at {address}: {first[:300]}",
                "This machine has to be a node of it: ray start --address=HOST:PORT, with the same Python and Ray.",
            ) from error
        raise GLMError(
            f"Ray does not start on this machine: {first[:300]}", "Free some memory, then resume."
        ) from error


def _knock(address: str) -> None:
    """GLMError where nothing answers at an address: Ray itself would try for a minute and then end the process."""
    host, _, port = address.rpartition(":")
    if not host:  # "auto": Ray knows where it runs on this machine
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        raise GLMError(
            f"Nothing answers at {address} ({error.strerror or error}).",
            "Start the head with `ray start --head`, and give the address that it prints.",
        ) from error


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


@contextmanager
def _folder(job: Job) -> Iterator[Path]:
    """An empty folder for Ray that goes with the block: in the workspace, or where that has too long a name."""
    from ..settings import Settings

    base = Settings.read().cache
    longest = len(os.fsencode(base / f"{MINE}99999999")) + len(SOCKET)
    if longest > LONGEST_SOCKET or not base.is_dir():
        base = Path(tempfile.gettempdir())
    for old in base.glob(f"{MINE}*"):  # of a process that was killed
        with suppress(OSError):
            owner = (old / "owner").read_text(encoding="utf-8")
            if process_alive(owner) is False:
                shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=MINE, dir=base))  # for this user alone
    try:
        (folder / "owner").write_text(this_process(), encoding="utf-8")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- the workers


class RayPool:
    """A pool of the scheduler whose workers are actors."""

    def __init__(
        self, ray: Any, job: Job, workers: int, cpus: float, gpus: int, device: str, far: bool
    ) -> None:
        self.ray, self.job = ray, job
        self._options = {
            "num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": "SPREAD",
        }  # fmt: skip
        self._given = (device, max(1, int(cpus)) if not gpus else 0)
        self._kind = ray.remote(Actor)
        self._actors: dict[int, Any] = {}
        self._calls: dict[Any, tuple[int, bool]] = {}  # the worker, and whether it is its first call

    def start(self, worker: int) -> None:
        actor = self._kind.options(**self._options).remote(self.job, *self._given)
        self._actors[worker] = actor
        self._calls[actor.open.remote()] = (worker, True)

    def send(self, worker: int, rows: Rows) -> None:
        self._calls[self._actors[worker].exchange.remote(rows)] = (worker, False)

    def wait(self, seconds: float) -> list[Event]:
        if not self._calls:
            return []
        ready, _ = self.ray.wait(list(self._calls), num_returns=1, timeout=seconds)
        if ready and len(self._calls) > 1:
            ready, _ = self.ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
        return [self._event(call, *self._calls.pop(call)) for call in ready]

    def drop(self, worker: int) -> None:
        actor = self._actors.pop(worker, None)
        self._calls = {call: one for call, one in self._calls.items() if one[0] != worker}
        if actor is not None:
            with suppress(Exception):  # the cluster may be gone
                self.ray.kill(actor, no_restart=True)

    def _event(self, call: Any, worker: int, first: bool) -> Event:
        try:
            found = self.ray.get(call)
        except self.ray.exceptions.RayError as error:
            return Died(worker, _reason(error), "node has died" in str(error))
        if first:
            if found.message:
                return Refused(worker, found.message, found.todo)
            return Opened(worker, found.node, found.at_once, found.facts)
        results, warnings, ended = found
        # What it had finished before its end is sent first; the end comes with the next report.
        return Died(worker, ended) if ended else Report(worker, results, warnings)


class Actor(Worker):
    """A worker as Ray makes it: it knows where it is."""

    def __init__(self, job: Job, device: str, threads: int) -> None:
        ray = importlib.import_module(RAY)
        address = str(ray.util.get_node_ip_address())
        if threads:
            os.environ["GLM_THREADS"] = str(threads)  # no more than its share, whatever would be fastest
        super().__init__(job, device, threads, f"{socket.gethostname()} ({address})")


def _reason(error: Exception) -> str:
    """Why a worker is gone, in a sentence, of Ray's where it has one that says something."""
    text = str(error)
    if "connection error code 2" in text:
        return KILLED
    if match := re.search(r"(?:Worker exit detail|The actor is dead because):? *([^\n]+)", text):
        text = match[1]
    first = re.split(r"(?<=\.)\s|\n", text.strip(), maxsplit=1)[0]
    return first[:200] or type(error).__name__
