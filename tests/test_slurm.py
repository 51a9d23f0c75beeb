"""The SLURM jobs as they are, with stand-ins for SLURM's two commands that start their tasks on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import tiny_pretrain

from lift.common.settings import save_settings

REPOSITORY = Path(__file__).parents[1]
SRUN = """#!/usr/bin/env bash
shift  # --kill-on-bad-exit=1
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$task "$@" &
    tasks+=($!)
done
worst=0
for task in "${tasks[@]}"; do
    wait "$task" || worst=$?
done
exit $worst
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; echo another-node; else echo "$@" >> "$REQUEUED"; fi
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "REQUEUED": str(tmp_path / "requeued"),
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "SLURM_JOB_ID": str((port - 20_000) % 20_000),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS": "2",
        "GLOO_SOCKET_IFNAME": "lo",
    }


@pytest.mark.timeout(300)
def test_two_tasks_train_one_run(pairs: Path, tiny_llm: Path, tmp_path: Path, cluster: dict[str, str]) -> None:
    settings = replace(tiny_pretrain(pairs, tiny_llm, tmp_path / "run", "clip"), epochs=2)
    save_settings(settings, tmp_path / "recipe.yaml")
    cluster["RECIPE"] = str(tmp_path / "recipe.yaml")
    script = [str(REPOSITORY / "scripts" / "slurm_pretrain_lift.sh"), "--log_every", "2"]
    subprocess.run(script, check=True, env=cluster, stderr=subprocess.DEVNULL)
    assert json.loads((settings.out / "finished.json").read_text())["steps"] == 6
    steps = [json.loads(line)["step"] for line in (settings.out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(
    ("script", "command"), [("slurm_pretrain_lift.sh", "lift pretrain"), ("slurm_train_llava.sh", "lmm train")]
)
@pytest.mark.parametrize(("status", "requeued"), [(75, True), (143, True), (2, False)])
def test_preempted_job_is_put_in_the_queue_again(
    script: str, command: str, status: int, requeued: bool, tmp_path: Path, cluster: dict[str, str]
) -> None:
    (tmp_path / "bin" / "srun").write_text(f'#!/usr/bin/env bash\nshift 3\necho "$@" > "{tmp_path}/asked"\nexit {status}\n')
    cluster["RECIPE"] = "recipe.yaml"
    done = subprocess.run([str(REPOSITORY / "scripts" / script), "--seed", "1"], env=cluster)
    assert done.returncode == status
    assert (tmp_path / "asked").read_text().split()[-6:] == [
        *command.split(),
        "--config",
        "recipe.yaml",
        "--seed",
        "1",
    ]
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text().split() == ["requeue", cluster["SLURM_JOB_ID"]]


@pytest.mark.parametrize("script", ["slurm_pretrain_lift.sh", "slurm_train_llava.sh"])
def test_outside_slurm_the_message_says_how_to_start(script: str) -> None:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run([str(REPOSITORY / "scripts" / script)], cwd=REPOSITORY, env=outside, capture_output=True, text=True)
    assert done.returncode != 0 and "start this script with sbatch" in done.stderr.splitlines()[-1]
