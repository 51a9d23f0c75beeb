"""Every stage consumes real data: photographs, human captions, LLaVA conversations, MMBench questions.

The recipes are those of configs/real with fewer steps and a smaller model; accuracy means nothing here. Skips where the data is
not on the machine.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demo.language_model import train_language_model
from demo.settings import LanguageModelSettings
from eval.lmm import lmm
from eval.settings import LmmSettings
from lift.common.settings import parse_settings
from lift.settings import PretrainSettings
from lift.train import pretrain
from lmm.finetune import finetune
from lmm.settings import FinetuneSettings

RECIPES = Path(__file__).parents[1] / "configs" / "real"
SMALL = ["--vision", "{image_size: 32, patch_size: 8, width: 32, layers: 3, heads: 2}", "--batch_size", "32", "--workers", "0"]


@pytest.fixture
def real(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIFT_DATA", str(shared / "data"))
    return shared / "data"


def _pretrain(recipe: str, out: Path, *changes: str) -> Path:
    arguments = ["--config", str(RECIPES / f"{recipe}.yaml"), "--out", str(out), "--epochs", "0.1", *SMALL, *changes]
    pretrain(parse_settings(PretrainSettings, arguments, recipe, ""))
    return out


def test_chain_on_real_photographs(real: Path, tmp_path: Path) -> None:
    llm = tmp_path / "llm"
    texts = tmp_path / "texts.jsonl"
    captions = json.loads((real / "coco_cc" / "captions.json").read_text())["annotations"]
    texts.write_text("".join(json.dumps({"text": row["caption"]}) + "\n" for row in captions[:64]))
    train_language_model(LanguageModelSettings(texts=texts, out=llm, width=32, layers=2, heads=2))

    lm_side = ["--text_encoder", f"{{kind: causal_lm, path: '{llm}', batch_size: 256}}"]
    lift, clip = _pretrain("lift", tmp_path / "lift", *lm_side), _pretrain("clip", tmp_path / "clip")
    first_batches = []
    for run in (lift, clip):
        finished = json.loads((run / "finished.json").read_text())
        assert finished["samples"] == 700 + 87 and finished["dropped"] == {}
        first_batches.append([json.loads(line)["keys"] for line in (run / "metrics.jsonl").read_text().splitlines()])
    assert first_batches[0] == first_batches[1]

    arguments = ["--config", str(RECIPES / "llava_stage1.yaml"), "--out", str(tmp_path / "llava"), "--llm", str(llm)]
    arguments += ["--vision_tower", str(lift / "encoder"), "--stage1.max_steps", "3", "--stage1.workers", "0"]
    llava = finetune(parse_settings(FinetuneSettings, arguments, "lmm finetune", ""))
    record = json.loads((llava / "train.json").read_text())
    assert record["samples"] == 2183 and record["dropped"] == {} and record["steps"] == 3

    questions = real / "mmbench" / "mmbench_sample_en.tsv"
    lmm(LmmSettings(folder=llava, data=questions, out=tmp_path / "mmbench", max_new_tokens=4))
    run = json.loads((tmp_path / "mmbench" / "run.json").read_text())
    assert run["rows"] == 20 and len(run["scores"]["l3"]) == 20
