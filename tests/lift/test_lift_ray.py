"""`lift embed --engine ray` on a cluster of this machine: a worker is killed, and the store is that of one process."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import embed_jobs
import psutil
import pytest

from lift.captions import read_captions
from lift.common.errors import UserError
from lift.common.ledger import DropLedger
from lift.embed import ShardReport, embed
from lift.settings import EmbedSettings, TextEncoderSettings
from lift.store import StoreWriter

ray = pytest.importorskip("ray")
from ray import exceptions  # noqa: E402

from lift import ray_engine  # noqa: E402


def embedding_worker(driver: int) -> psutil.Process | None:
    """The process of an actor that is embedding a shard, among the descendants of `driver`, by the title that Ray gives it."""
    for process in psutil.Process(driver).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith("ray::Worker.embed"):
                return process
    return None


def test_a_killed_worker_changes_nothing(tiny_llm: Path, tmp_path: Path) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("".join(f"caption {i % 97} {'long ' * (i % 40)}\n" for i in range(400)))
    encoder = ["--text-encoder", str(tiny_llm), "--text_encoder.batch_tokens", "1"]
    local = ["embed", "--captions", str(captions), "--shard-size", "10", *encoder, "--max-length", "300"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    log = (tmp_path / "driver.txt").open("w")
    cluster = ["--engine", "ray", "--workers", "2", "--ray-address", "local", "--out", "store"]
    driver = subprocess.Popen(
        [sys.executable, "-m", "lift", *local, *cluster], cwd=tmp_path, env=environment, stdout=log, stderr=log
    )
    try:
        assert embed_jobs.run([*local, "--out", str(tmp_path / "alone")], tmp_path / "alone.txt") == 0
        while not list((tmp_path / "store").glob("*.arrow")) or (worker := embedding_worker(driver.pid)) is None:
            assert driver.poll() is None, (tmp_path / "driver.txt").read_text()
            time.sleep(0.02)
        worker.kill()
        assert not (tmp_path / "store" / "manifest.json").exists(), "the worker was not caught at work"
        assert driver.wait(timeout=200) == 0, (tmp_path / "driver.txt").read_text()
    finally:
        driver.kill()
        log.close()
    printed = (tmp_path / "driver.txt").read_text()
    assert re.search(r"shard captions-\w+-\w+: its Ray worker was lost \(ActorDiedError\); it is done again", printed)
    assert "400 embeddings, float16" in printed
    assert embed_jobs.hashes(tmp_path / "store") == embed_jobs.hashes(tmp_path / "alone")


class FakeWorker:
    """Stands for an actor: each call returns a reference whose outcome `Cluster.get` tells."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.cluster = cluster
        self.number = number

    @property
    def load(self) -> FakeWorker:
        return self

    @property
    def embed(self) -> FakeWorker:
        return self

    def remote(self, *arguments: object) -> tuple[int, str]:
        name = getattr(arguments[0], "name", "") if arguments else "load"
        self.cluster.calls.append((self.number, name))
        return len(self.cluster.calls), name


class Cluster:
    """Two workers; the outcomes of a shard's attempts are given, then it succeeds."""

    def __init__(self, outcomes: dict[str, list[Exception]]) -> None:
        self.outcomes = outcomes
        self.calls: list[tuple[int, str]] = []
        self.killed: list[int] = []
        self.started = 0

    def start(self) -> FakeWorker:
        self.started += 1
        return FakeWorker(self, self.started)

    def get(self, reference: tuple[int, str]) -> int | ShardReport:
        if self.outcomes.get(reference[1]):
            raise self.outcomes[reference[1]].pop(0)
        return 32 if reference[1] == "load" else ShardReport(reference[1], 1, [])


@pytest.fixture
def shards(tmp_path: Path) -> list:
    (tmp_path / "list.txt").write_text("a\nb\nc\nd\n")
    return read_captions(tmp_path / "list.txt", "lines", 1, DropLedger())


def pool_of(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> ray_engine.Pool:
    monkeypatch.setattr(ray_engine.ray, "wait", lambda references, timeout: ([references[0]], references[1:]))
    monkeypatch.setattr(ray_engine.ray, "get", cluster.get)
    monkeypatch.setattr(ray_engine.ray, "kill", lambda worker: cluster.killed.append(worker.number))
    return ray_engine.Pool(cluster.start, 2, "1 CPU")


def test_every_shard_is_reported_once_however_many_workers_are_lost(shards: list, tmp_path: Path, monkeypatch) -> None:
    lost = exceptions.ActorDiedError
    cluster = Cluster(
        {"load": [lost()], shards[0].name: [lost()] * 3, shards[2].name: [lost(), exceptions.OutOfMemoryError("")]}
    )
    pool = pool_of(cluster, monkeypatch)
    assert pool.dimension() == 32
    reports = list(pool.run(shards, StoreWriter(tmp_path / "store", {}, 32)))
    assert sorted(report.name for report in reports) == [shard.name for shard in shards]
    assert (cluster.started, len(cluster.killed)) == (2 + 6, 6)
    after_loss = {number for number, _ in cluster.calls[cluster.calls.index((cluster.killed[-1], "load")) + 2 :]}
    assert after_loss - set(cluster.killed)


def test_a_shard_that_costs_every_worker_ends_the_run(shards: list, tmp_path: Path, monkeypatch) -> None:
    cluster = Cluster({shards[1].name: [exceptions.ActorDiedError()] * ray_engine.ATTEMPTS})
    pool = pool_of(cluster, monkeypatch)
    pool.dimension()
    with pytest.raises(UserError, match=rf"shard {shards[1].name}: 4 Ray workers were lost one after the other"):
        list(pool.run(shards, StoreWriter(tmp_path / "store", {}, 32)))


def test_what_a_worker_raises_comes_back_as_it_was(shards: list, tmp_path: Path, monkeypatch) -> None:
    full = OSError(28, "No space left on device")
    cluster = Cluster({shards[0].name: [exceptions.RayTaskError("embed", "traceback", full, "title", 1, "ip")]})
    pool = pool_of(cluster, monkeypatch)
    pool.dimension()
    with pytest.raises(OSError, match="No space left") as caught:
        list(pool.run(shards, StoreWriter(tmp_path / "store", {}, 32)))
    assert caught.value.errno == 28 and not isinstance(caught.value, exceptions.RayError)


def test_a_worker_refuses_another_model_and_a_folder_that_it_does_not_see(tiny_llm: Path, shards: list, tmp_path: Path) -> None:
    settings = TextEncoderSettings(kind="causal_lm", path=str(tiny_llm))
    with pytest.raises(UserError, match="are not those that the driver sees"):
        ray_engine.Worker(settings, {"revision": "another"}, Path.cwd()).load()
    writer = StoreWriter(tmp_path / "store", {}, 32)
    with pytest.raises(UserError, match="does not see the store's folder"):
        ray_engine.Worker(settings, {}, Path.cwd()).embed(shards[0], writer)


def test_no_cluster_and_no_ray_are_one_message_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list.txt").write_text("a\n")
    settings = EmbedSettings(captions=tmp_path / "list.txt", out=tmp_path / "store", engine="ray", ray_address="auto")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match="ray_address auto: no Ray cluster can be reached there"):
        embed(settings)
    for name in [name for name in sys.modules if name.partition(".")[0] == "ray" or name == "lift.ray_engine"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delattr("lift.ray_engine", raising=False)
    with pytest.raises(UserError, match="the package ray is not installed"):
        embed(settings)
