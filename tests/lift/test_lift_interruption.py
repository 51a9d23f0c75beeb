"""Runs that are killed, preempted, moved to other numbers of workers and processes: they end as if nothing had happened."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import pretrain_on_one_thread, tiny_pretrain

from lift.common.settings import save_settings
from lift.embed import embed
from lift.run_folder import best_checkpoints, checkpoints, save_best
from lift.settings import EmbedSettings, PretrainSettings
from lift.train import pretrain


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoints(run)[-1] / "model.safetensors")


def assert_same_weights(run: Path, other: Path) -> None:
    one, two = final_weights(run), final_weights(other)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def processes() -> Any:
    """Processes that have imported everything beforehand, so that most of their life is training."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lift.train"])
    return context


@pytest.mark.timeout(900)
def test_killed_at_any_instant_in_ten_trials(pairs: Path, tiny_llm: Path, tmp_path: Path, processes: Any) -> None:
    """SIGKILL, then the same command, on another number of loader workers; bit-identical weights in the end."""
    settings = replace(tiny_pretrain(pairs, tiny_llm, tmp_path / "whole"), epochs=16, checkpoint_every=4, patch_dropout=0.25)

    def started(settings: PretrainSettings) -> Any:
        process = processes.Process(target=pretrain_on_one_thread, args=(settings,))
        process.start()
        return process

    started(replace(settings, out=tmp_path / "first", embeddings=None)).join()  # starts the server of processes, too
    start = time.monotonic()
    whole = started(settings)
    whole.join()
    assert whole.exitcode == 0
    duration = time.monotonic() - start
    instants = random.Random(0)
    killed = 0
    for trial in range(10):
        out = tmp_path / f"cut{trial}"
        cut = started(replace(settings, out=out, embeddings=None))
        cut.join(instants.uniform(0.05, 0.95) * duration)
        killed += cut.is_alive()
        cut.kill()
        cut.join()
        again = started(replace(settings, out=out, embeddings=None, workers=trial % 3))
        again.join()
        assert again.exitcode == 0
        assert_same_weights(settings.out, out)
        finished = [json.loads((run / "finished.json").read_text()) for run in (settings.out, out)]
        assert finished[0]["steps"] == finished[1]["steps"] == 48
        assert [row["loss"] for row in rows(settings.out)] == [row["loss"] for row in rows(out)]
    assert killed >= 5


def test_preemption_saves_and_asks_to_be_requeued(pairs: Path, tiny_llm: Path, tmp_path: Path) -> None:
    whole = replace(tiny_pretrain(pairs, tiny_llm, tmp_path / "whole", "clip"), epochs=20, checkpoint_every=1000)
    pretrain(whole)
    settings = replace(whole, out=tmp_path / "cut", embeddings=None, workers=2)
    save_settings(settings, tmp_path / "cut.yaml")
    command = [sys.executable, "-m", "lift", "pretrain", "--config", str(tmp_path / "cut.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (settings.out / "metrics.jsonl").is_file() or len(rows_so_far(settings.out)) < 3:
        time.sleep(0.02)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)  # torchrun and SLURM signal the loader's workers too
    _, message = process.communicate()
    assert process.returncode == 75
    assert "stopped: asked to end; saved step" in message.splitlines()[-1]
    saved = int(checkpoints(settings.out)[-1].name.removeprefix("step_"))
    assert 3 <= saved < 60
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert len(rows(settings.out)) == 60
    assert [row["keys"] for row in rows(settings.out)] == [row["keys"] for row in rows(whole.out)]


def rows_so_far(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


@pytest.mark.timeout(600)
def test_two_nodes_and_then_one_process_see_the_same_samples(pairs: Path, tiny_llm: Path, tmp_path: Path) -> None:
    """Two launchers, each with one process, meet on the loopback as two nodes would; what they left goes on alone."""
    alone = replace(tiny_pretrain(pairs, tiny_llm, tmp_path / "alone"), epochs=4, checkpoint_every=6)
    embed(EmbedSettings(data=alone.data, out=tmp_path / "store", text_encoder=alone.text_encoder))
    alone = replace(alone, embeddings=tmp_path / "store")
    pretrain(alone)
    cut = replace(alone, out=tmp_path / "cut")
    save_settings(cut, tmp_path / "cut.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stop = "import lift.train as t; step = t._Loop._step\n"
    stop += "def dies(self, number, batch):\n    assert number != 9\n    return step(self, number, batch)\n"
    stop += "t._Loop._step = dies\nfrom lift.__main__ import main\nraise SystemExit(main())\n"
    (tmp_path / "dies.py").write_text(stop)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1"]
    nodes = [
        subprocess.Popen(
            [*launch, f"--master_port={port}", f"--node_rank={rank}", str(tmp_path / "dies.py"), "pretrain", "--config",
             str(tmp_path / "cut.yaml")],
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]  # fmt: skip
    assert all(node.wait() != 0 for node in nodes)
    assert [path.name for path in checkpoints(cut.out)] == ["step_00000006"]
    shared = rows(cut.out)
    assert len(shared) >= 6
    pretrain(cut)
    ended = rows(cut.out)
    assert [row["keys"] for row in ended] == [row["keys"] for row in rows(alone.out)]
    torch.testing.assert_close(
        torch.tensor([row["loss"] for row in shared[:6]]),
        torch.tensor([row["loss"] for row in rows(alone.out)[:6]]),
        atol=1e-4,
        rtol=0,
    )
    torch.testing.assert_close(ended[-1]["loss"], rows(alone.out)[-1]["loss"], atol=1e-3, rtol=0)


def test_what_a_run_without_checkpoint_left_is_not_taken_over(pairs: Path, tiny_llm: Path, tmp_path: Path) -> None:
    """The second run has another vocabulary; the first left its tokenizer and a best checkpoint of a high score."""
    first = tiny_pretrain(pairs, tiny_llm, tmp_path / "run", "clip")
    pretrain(first)
    shutil.rmtree(first.out / "checkpoints")
    (first.out / "finished.json").unlink()
    save_best(first.out, 5, 1e9, torch.nn.Linear(1, 1), {})
    second = replace(first, clip_text=replace(first.clip_text, vocabulary_size=270))
    pretrain(second)
    (words,) = [tensor for name, tensor in final_weights(second.out).items() if name.endswith("token_embedding.weight")]
    assert len(words) == 270
    assert best_checkpoints(second.out) == []
