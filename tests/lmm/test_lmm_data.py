"""Checking samples before training, collating, and the order of samples."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_lmm import conversation, make_tokenizer
from transformers import AutoProcessor, CLIPImageProcessor, LlavaForConditionalGeneration

from lift.common.errors import UserError
from lift.common.ledger import DropLedger
from lift.common.settings import parse_settings
from lmm.batches import Collator, EpochSampler
from lmm.build import build
from lmm.checkpoints import mark_complete, newest_complete, remove_incomplete
from lmm.conversation import IGNORED_LABEL, ConversationEncoder, load_template, parse_row
from lmm.data import ConversationDataset, check_samples, describe_sources, read_sources
from lmm.processor import set_aspect_ratio
from lmm.settings import (
    BuildSettings,
    ConversationSource,
    FinetuneSettings,
    InstructionTuningSettings,
    LoraSettings,
    StageSettings,
)


@pytest.fixture
def encoder() -> ConversationEncoder:
    return ConversationEncoder(make_tokenizer(), load_template("vicuna_v1"), "vicuna_v1", "<image>", 16, 400)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_unusable_sample_is_counted_by_cause(
    workers: int, encoder: ConversationEncoder, data: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    shutil.copytree(data / "images", images)
    Image.effect_noise((80, 80), 50).save(images / "cut.jpg")
    whole = (images / "cut.jpg").read_bytes()
    (images / "cut.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    (images / "text.png").write_text("not an image")
    rows = json.loads((data / "chat.json").read_text())
    bad = [conversation(name, "Yes.", name) for name in ("cut.jpg", "text.png", "none.png")]
    bad += [conversation("long", "x" * 500, None), conversation("empty", "", None)]
    rows = rows * 50 + bad
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = ConversationSource(annotations=tmp_path / "rows.jsonl", images=images)
    ledger = DropLedger()
    usable, supervised = check_samples(read_sources([source]), encoder, ledger, workers)
    causes = {"undecodable image": 2, "missing image": 1, "longer than max_length": 1, "empty answer": 1}
    assert ledger.counts() == causes
    assert [row.value for row in usable] == rows[:-5]
    answers = [row["conversations"][1]["value"] for row in rows[:-5]]
    assert supervised == sum(len(f" {answer}".encode()) + 1 for answer in answers)


def test_cut_samples_are_counted_and_have_their_cut_length(encoder: ConversationEncoder, data: Path, tmp_path: Path) -> None:
    rows = [conversation("short", "Yes.", None), conversation("long", "x" * 500, None)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    source = ConversationSource(annotations=tmp_path / "rows.json")
    encoder.cuts = True
    ledger = DropLedger()
    usable, supervised = check_samples(read_sources([source]), encoder, ledger, 0)
    whole = encoder.tokens(parse_row(rows[1], None).messages)
    assert ledger.counts() == {} and usable.cut_samples == 1 and usable.cut.tolist() == [0, len(whole.input_ids) - 400]
    assert usable.lengths[1] == 400
    assert supervised == len(" Yes.") + 1 + sum(label != IGNORED_LABEL for label in whole.labels[:400])
    dataset = ConversationDataset(usable, encoder, None)
    assert dataset[1]["input_ids"] == whole.input_ids[:400] and usable.select([1]).cut_samples == 1


def test_a_sample_without_supervised_token_is_an_error_unless_it_is_to_be_dropped(data: Path) -> None:
    silent = ConversationEncoder(
        make_tokenizer(), "{% for m in messages %}{{ '' }}{% endfor %}USER: x", "silent", "<image>", 16, 400
    )
    silent.content_as_parts = False
    (rows,) = [read_sources([ConversationSource(annotations=data / "chat.json", images=data / "images")])]
    text_only = rows.select([0, 3])
    with pytest.raises(UserError, match=r"chat\.json#0:0: .*'silent' leaves no supervised token"):
        check_samples(text_only, silent, DropLedger(), 0)
    ledger = DropLedger()
    usable, supervised = check_samples(text_only, silent, ledger, 0, drop_unsupervised=True)
    assert (len(usable), supervised, ledger.counts()) == (0, 0, {"nothing supervised": 2})


def test_a_template_that_loses_images_is_told_from_the_counts(data: Path) -> None:
    encoder = ConversationEncoder(
        make_tokenizer(),
        "{% for m in messages %}{{ m['content'] | replace('<image>', '') }}|{% endfor %}",
        "t",
        "<image>",
        16,
        400,
    )
    rows = read_sources([ConversationSource(annotations=data / "caption.json", images=data / "images")])
    ledger = DropLedger()
    check_samples(rows, encoder, ledger, 0)
    assert ledger.counts() == {"image tokens": 12}


@pytest.mark.parametrize(
    ("content", "message"), [("[]", "non-empty list"), ("{}", "non-empty list"), ("[{", "JSON"), (None, "no such file")]
)
def test_bad_annotation_files_are_user_errors(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_sources([ConversationSource(annotations=path)])


def test_missing_image_folder_is_a_user_error(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_sources([ConversationSource(annotations=data / "chat.json", images=tmp_path / "none")])


def test_data_identity_follows_content(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "copy")
    copy = ConversationSource(annotations=tmp_path / "copy" / "chat.json", images=tmp_path / "copy" / "images")
    original = describe_sources([ConversationSource(annotations=data / "chat.json", images=data / "images")])[0]
    same = describe_sources([copy])[0]
    assert same["images_sha256"] == original["images_sha256"]
    (tmp_path / "copy" / "images" / "1.png").write_bytes(b"")
    assert describe_sources([copy])[0]["images_sha256"] != original["images_sha256"]


def test_text_only_batch_gives_the_loss_of_text_alone_and_no_projector_gradient(tower: Path, llm: Path, tmp_path: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(
        build(BuildSettings(vision_tower=tower, llm=llm, out=tmp_path / "model"))
    )
    collate = Collator(pad_id=0, image_token_id=3, tokens_per_image=16, image_shape=(3, 32, 32))
    long, short = list(range(10, 40)), list(range(50, 60))
    samples = [{"input_ids": ids, "labels": ids, "pixel_values": None} for ids in (long, short)]
    batch = collate(samples)
    assert batch["input_ids"].shape == (2, 30)
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    assert int((batch["input_ids"] == 3).sum()) == 16
    assert batch["attention_mask"].sum(1).tolist() == [30, 10]
    loss = model(**batch).loss
    loss.backward()
    gradient = model.model.multi_modal_projector.linear_1.weight.grad
    assert gradient is not None and gradient.abs().max() == 0
    text = [model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss * (len(ids) - 1) for ids in (long, short)]
    assert torch.allclose(loss, sum(text) / 38, atol=1e-6)


def test_padding_to_a_square_is_saved_with_the_model(tower: Path, llm: Path, data: Path, tmp_path: Path) -> None:
    out = build(BuildSettings(vision_tower=tower, llm=llm, out=tmp_path / "model"))
    processor = AutoProcessor.from_pretrained(out)
    wide = Image.new("RGB", (64, 32), (255, 0, 0))
    reference = CLIPImageProcessor.from_pretrained(tower)
    square = Image.new("RGB", (64, 64), tuple(int(255 * mean) for mean in reference.image_mean))
    square.paste(wide, (0, 16))
    for ratio, image in (("pad", square), ("crop", wide)):
        set_aspect_ratio(processor, ratio)
        processor.save_pretrained(tmp_path / ratio)
        loaded = AutoProcessor.from_pretrained(tmp_path / ratio).image_processor
        expected = reference(image, return_tensors="pt")["pixel_values"]
        assert torch.equal(loaded(wide, return_tensors="pt")["pixel_values"], expected), ratio


def test_training_tokens_are_those_of_the_processor_at_inference(
    tower: Path, llm: Path, data: Path, encoder: ConversationEncoder, tmp_path: Path
) -> None:
    out = build(BuildSettings(vision_tower=tower, llm=llm, out=tmp_path / "model", chat_template="vicuna_v1"))
    processor = AutoProcessor.from_pretrained(out, backend="pil")
    source = ConversationSource(annotations=data / "caption.json", images=data / "images")
    sample = ConversationDataset(read_sources([source]), encoder, processor.image_processor)[2]
    parts = [{"type": "image"}, {"type": "text", "text": "Which colour?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    inputs = processor(text=prompt, images=Image.open(data / "images" / "2.png"), return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    assert sample["input_ids"][: len(ids)] == ids
    assert torch.equal(sample["pixel_values"], inputs["pixel_values"])


def test_order_is_a_function_of_seed_and_epoch() -> None:
    sampler = EpochSampler(50, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
    other = EpochSampler(50, seed=3)
    other.set_epoch(1)
    assert list(other) == second
    assert list(EpochSampler(50, seed=4)) != first


def test_newest_complete_checkpoint_wins(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_text("w" * step)
        if step < 15:
            mark_complete(folder, world_size=1)
    assert newest_complete(tmp_path, 1) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "weights").write_text("w")
    assert newest_complete(tmp_path, 1) == tmp_path / "checkpoint-5"
    remove_incomplete(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    with pytest.raises(UserError, match="written by 1 processes"):
        newest_complete(tmp_path, 2)


def test_stage2_in_a_file_keeps_its_own_defaults(tmp_path: Path) -> None:
    source = [{"annotations": "a.json", "images": "i"}]
    file = tmp_path / "recipe.yaml"
    file.write_text(
        json.dumps({"vision_tower": "t", "llm": "l", "out": "o", "stage1": {"data": source}, "stage2": {"data": source}})
    )
    settings = parse_settings(FinetuneSettings, ["--config", str(file), "--stage2.batch_size", "3"], "lmm finetune", "")
    assert settings.stage2 is not None and settings.stage1.trainable == "projector"
    assert (settings.stage2.trainable, settings.stage2.template, settings.stage2.batch_size) == ("projector_and_llm", "chat", 3)
    assert parse_settings(FinetuneSettings, ["--config", str(file), "--stage2", "null"], "lmm finetune", "").stage2 is None
    with pytest.raises(UserError, match="learning_rate"):
        parse_settings(FinetuneSettings, ["--config", str(file), "--stage1.learning_rate", "0"], "lmm finetune", "")


def test_texts_and_names_that_no_file_can_have_go_to_the_ledger(
    data: Path, encoder: ConversationEncoder, tmp_path: Path
) -> None:
    """Both are legal JSON: half of a surrogate pair, and a zero character in a file's name."""
    rows = [conversation("0", "fine", None), conversation("1", "half \ud83d", None), conversation("2", "Yes.", "a\0b.png")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    ledger = DropLedger()
    sources = read_sources([ConversationSource(annotations=tmp_path / "rows.json", images=data / "images")])
    usable, _ = check_samples(sources, encoder, ledger, workers=0)
    assert len(usable) == 1 and ledger.counts() == {"text that is no Unicode": 1, "missing image": 1}
    ledger.write(tmp_path / "dropped.jsonl")
    assert len((tmp_path / "dropped.jsonl").read_text().splitlines()) == 2


def test_lora_in_stage_1_leads_nowhere_and_is_refused(tmp_path: Path) -> None:
    source = [ConversationSource(annotations=tmp_path / "rows.json")]
    parts = {"vision_tower": tmp_path, "llm": tmp_path, "out": tmp_path / "out"}
    stage1 = StageSettings(data=source, trainable="projector_and_llm", lora=LoraSettings())
    with pytest.raises(ValueError, match=r"stage1\.lora: stage 2 starts from a whole model"):
        FinetuneSettings(**parts, stage1=stage1, stage2=InstructionTuningSettings(data=source))
