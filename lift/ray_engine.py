"""`lift embed --engine ray`: shards go to the workers of a Ray cluster, reports come back; a lost worker's shard is redone.

A worker is an actor that holds the text encoder, reads the captions of its shard itself and writes the shard's file straight to
the store's folder, which driver and workers must share. The driver keeps the store's lock, progress, drop ledger and manifest.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import exceptions
from tqdm import tqdm

from lift.common.errors import UserError
from lift.common.files import LOCK_FILE
from lift.embed import CaptionShard, Engine, ShardReport, embed_shard
from lift.settings import TextEncoderSettings
from lift.store import StoreWriter
from lift.text_encoders import TextEncoder, describe_text_encoder, load_text_encoder

WORKER_LOST = (
    exceptions.RayActorError,
    exceptions.NodeDiedError,
    exceptions.OutOfMemoryError,
    exceptions.WorkerCrashedError,
    exceptions.ObjectLostError,
)
ATTEMPTS = 4
"""Workers that one shard, or loading the encoder, may cost in a row before the run gives up."""
LOCAL_OBJECT_STORE_BYTES = 200 * 2**20
"""Shards and reports are small: captions are read, and embeddings written, by the workers."""
PATIENCE_SECONDS = 60
"""Without a ready worker for so long the driver says what it is waiting for."""


@contextlib.contextmanager
def ray_engine(
    text_encoder: TextEncoderSettings, workers: int, address: str, gpus_per_worker: float | None
) -> Iterator[Engine]:
    """Connects to the cluster, starts the workers and waits until one has loaded the encoder.

    Args:
        address: `local` starts a cluster of this machine alone; `auto` finds the running one; else HOST:PORT.
        gpus_per_worker: reserved by each worker; None for one where the cluster has any.
    Raises:
        UserError: no cluster at that address, or the encoder does not load.
    """
    _connect(address, workers)
    try:
        resources = ray.cluster_resources()
        gpus = float("GPU" in resources) if gpus_per_worker is None else gpus_per_worker
        description = describe_text_encoder(text_encoder)
        actor = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(Worker)
        pool = Pool(lambda: actor.remote(text_encoder, description, Path.cwd()), workers, f"1 CPU and {gpus:g} GPU")
        yield Engine(pool.dimension(), pool.run)
    finally:
        ray.shutdown()


def _connect(address: str, workers: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == "local":
        ray.init(
            address="local",
            num_cpus=max(workers, os.cpu_count() or 1),
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        return
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"ray_address {address}: no Ray cluster can be reached there: {' '.join(str(error).split())}. "
            "Start one (ray start --head), or give --ray_address local."
        ) from error


class Worker:
    """The actor: one text encoder, loaded at the first call so that a fault in loading comes back as what it is."""

    def __init__(self, text_encoder: TextEncoderSettings, description: dict[str, Any], folder: Path) -> None:
        with contextlib.suppress(OSError):  # only relative paths need the driver's working folder
            os.chdir(folder)
        self.text_encoder = text_encoder
        self.description = description
        self.encoder: TextEncoder | None = None

    def load(self) -> int:
        """Dimension of the embeddings.

        Raises:
            UserError: no encoder can be loaded on this node, or another one than the driver sees.
        """
        if describe_text_encoder(self.text_encoder) != self.description:
            raise UserError(
                f"text_encoder.path {self.text_encoder.path}: the files on {socket.gethostname()} are not those that the "
                "driver sees. Put the same model on every node, or in a shared folder."
            )
        self.encoder = load_text_encoder(self.text_encoder)
        return self.encoder.dimension

    def embed(self, shard: CaptionShard, writer: StoreWriter) -> ShardReport:
        if not (writer.folder / LOCK_FILE).is_file():
            raise UserError(
                f"{writer.folder}: {socket.gethostname()} does not see the store's folder. It must lie on a file system that "
                "all nodes share; give its absolute path."
            )
        assert self.encoder is not None
        try:
            return embed_shard(shard, self.encoder, writer)
        except FileNotFoundError as error:
            raise UserError(
                f"{error.filename}: {socket.gethostname()} does not see this file. Captions and the sources' index "
                "(data.index, LIFT_CACHE) must lie on a file system that all nodes share; give absolute paths."
            ) from error


class Pool:
    """Keeps every worker busy with one shard. A lost worker is replaced, and its shard goes to the next idle one."""

    def __init__(self, start: Callable[[], Any], workers: int, need: str) -> None:
        self.start = start
        self.need = need
        self.idle: list[Any] = []
        self.waiting: deque[CaptionShard] = deque()
        self.busy: dict[Any, tuple[Any, CaptionShard | None]] = {}
        """Reference of the result that is awaited -> the worker and its shard, None while it loads the encoder."""
        self.lost: Counter[str] = Counter()
        for _ in range(workers):
            self._add_worker()

    def dimension(self) -> int:
        """Waits until one worker has loaded the encoder."""
        while True:
            result = self._next_result()
            if isinstance(result, int):
                return result

    def run(self, shards: Sequence[CaptionShard], writer: StoreWriter) -> Iterator[ShardReport]:
        self.waiting.extend(shards)
        missing = len(shards)
        while missing:
            while self.idle and self.waiting:
                worker, shard = self.idle.pop(), self.waiting.popleft()
                self.busy[worker.embed.remote(shard, writer)] = (worker, shard)
            result = self._next_result()
            if isinstance(result, ShardReport):
                missing -= 1
                yield result

    def _add_worker(self) -> None:
        worker = self.start()
        self.busy[worker.load.remote()] = (worker, None)

    def _next_result(self) -> ShardReport | int | None:
        """The next report, or the dimension from a worker that has loaded the encoder, or None after a loss.

        Raises:
            UserError: the same shard has cost too many workers; and what a worker raised.
        """
        done, _ = ray.wait(list(self.busy), timeout=PATIENCE_SECONDS)
        if not done:
            if not self.idle and all(shard is None for _, shard in self.busy.values()):
                tqdm.write(f"no Ray worker is ready yet: each needs {self.need}, the cluster has {_free_resources()} free")
            return None
        worker, shard = self.busy.pop(done[0])
        try:
            result = ray.get(done[0])
        except exceptions.RayTaskError as error:
            raise error.cause from None
        except WORKER_LOST as error:
            self._replace(worker, shard, error)
            return None
        self.lost[_task_name(shard)] = 0
        self.idle.append(worker)
        return result

    def _replace(self, worker: Any, shard: CaptionShard | None, error: Exception) -> None:
        ray.kill(worker)  # one that is only cut off must not go on beside its successor
        name = _task_name(shard)
        self.lost[name] += 1
        if self.lost[name] == ATTEMPTS:
            raise UserError(
                f"{name}: {ATTEMPTS} Ray workers were lost one after the other ({type(error).__name__}). If memory ran out, "
                "lower text_encoder.batch_tokens; finished shards are kept."
            ) from error
        tqdm.write(f"{name}: its Ray worker was lost ({type(error).__name__}); it is done again")
        if shard is not None:
            self.waiting.appendleft(shard)
        self._add_worker()


def _task_name(shard: CaptionShard | None) -> str:
    return "loading the text encoder" if shard is None else f"shard {shard.name}"


def _free_resources() -> str:
    free = ray.available_resources()
    return f"{free.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} GPU"
