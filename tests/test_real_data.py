"""Every stage consumes real data: photographs, human captions, LLaVA conversations, MMBench questions.

The commands are those a user types, on the recipes of configs/real with fewer steps and a smaller model; accuracy means nothing
here. Skips where the data is not on the machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from eval.records import read_records

RECIPES = Path(__file__).parents[1] / "configs" / "real"
SMALL = ["--epochs", "0.1", "--batch_size", "32", "--workers", "0"]
SMALL += ["--vision", "{image_size: 32, patch_size: 8, width: 32, layers: 3, heads: 2}"]


def _run(package: str, *arguments: str | Path, data: Path) -> None:
    environment = os.environ | {"LIFT_DATA": str(data), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", package, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_chain_on_real_photographs(shared: Path, tmp_path: Path) -> None:
    data = shared / "data"
    llm, lift, clip, llava, mmbench = (tmp_path / name for name in ("llm", "lift", "clip", "llava", "mmbench"))
    captions = _read(data / "coco_cc" / "captions.json")["annotations"]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": row["caption"]}) + "\n" for row in captions[:64]))
    _run("demo", "language_model", "--texts", texts, "--out", llm, "--width", "32", "--layers", "2", "--heads", "2", data=data)

    text_encoder = f"{{kind: causal_lm, path: '{llm}'}}"
    recipe = RECIPES / "lift.yaml"
    _run("lift", "pretrain", "--config", recipe, "--out", lift, *SMALL, "--text_encoder", text_encoder, data=data)
    _run("lift", "pretrain", "--config", RECIPES / "clip.yaml", "--out", clip, *SMALL, data=data)
    keys = []
    for run in (lift, clip):
        finished = _read(run / "finished.json")
        assert finished["samples"] == 700 + 87 and finished["dropped"] == {}
        keys.append([json.loads(line)["keys"] for line in (run / "metrics.jsonl").read_text().splitlines()])
    assert keys[0] == keys[1]

    recipe = RECIPES / "llava_stage1.yaml"
    steps = ["--stage1.max_steps", "3", "--stage1.workers", "0"]
    _run(
        "lmm",
        "finetune",
        "--config",
        recipe,
        "--vision_tower",
        lift / "encoder",
        "--llm",
        llm,
        "--out",
        llava,
        *steps,
        data=data,
    )
    record = _read(llava / "stage1" / "train.json")
    assert record["samples"] == 2183 and record["dropped"] == {} and record["steps"] == 3

    questions = data / "mmbench" / "mmbench_sample_en.tsv"
    _run("eval", "lmm", llava / "stage1", "--data", questions, "--out", mmbench, "--max_new_tokens", "4", data=data)
    task = _read(mmbench / "run.json")["tasks"]["mmbench"]
    assert task["rows"] == 20 and not task["likelihood"]  # the language model's tokenizer knows single bytes only
    assert len({record.categories["l3"] for record in read_records(mmbench / "mmbench" / "records.jsonl")}) == 20
