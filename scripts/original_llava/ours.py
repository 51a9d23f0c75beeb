"""Our side of scripts/check_original_llava.sh: makes the tiny inputs, and compares with what the original's code gave."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200), "white": (250, 250, 250)}
HIDDEN = 64


def data(work: str) -> None:
    """Images with conversations and questions, and the encoder's recipe."""
    folder = Path(work)
    (folder / "images").mkdir()
    conversations, questions = [], []
    for number in range(16):
        colour = list(COLOURS)[number % 4]
        file = folder / "images" / f"{number}.png"
        Image.linear_gradient("L").resize((60 + 3 * number, 48)).convert("RGB").save(file)
        Image.blend(Image.open(file), Image.new("RGB", (60 + 3 * number, 48), COLOURS[colour]), 0.7).save(file)
        turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": f"The picture is {colour}."}]
        conversations.append({"id": str(number), "image": file.name, "conversations": turns})
        questions.append({"image": str(file), "question": f"Which colour has picture {number}?"})
    (folder / "conversations.json").write_text(json.dumps(conversations))
    (folder / "questions.json").write_text(json.dumps(questions[:4]))
    recipe = {
        "data": [{"kind": "llava_json", "path": str(folder / "conversations.json"), "images": str(folder / "images")}],
        "objective": "clip",
        "out": str(folder / "run"),
        "vision": {"image_size": 32, "patch_size": 8, "width": 48, "layers": 3, "heads": 4},
        "clip_text": {"width": 16, "layers": 1, "heads": 2, "context_length": 16, "embedding_dim": 16, "vocabulary_size": 300},
        "batch_size": 8,
        "epochs": 2,
        "workers": 0,
    }
    (folder / "pretrain.yaml").write_text(yaml.safe_dump(recipe))


def llm(out: str) -> None:
    """A tiny Llama whose tokenizer is not SentencePiece: tokenizer.json alone, byte-level."""
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    ).save_pretrained(out)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=260, hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=1024, initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(out)


def features(tower: str, image: str, theirs: str) -> None:
    processor = CLIPImageProcessorPil.from_pretrained(tower)
    pixels = processor(Image.open(image).convert("RGB"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        found = CLIPVisionModel.from_pretrained(tower)(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
    difference = (found - torch.tensor(json.loads(Path(theirs).read_text()))).abs().max().item()
    print(f"   patch features of layer -2, {list(found.shape)}: largest difference {difference:.1e}")
    assert difference < 1e-4


def steps(*folders: str) -> None:
    for folder in folders:
        history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
        losses = [round(entry["loss"], 4) for entry in history if "loss" in entry]
        print(f"   {Path(folder).name}: loss by step {losses}")
        assert len(losses) == 2 and losses[1] < losses[0]


def answers(folder: str, questions: str, theirs: str) -> None:
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    # float16 is what the original's loader reads weights as; float32 is what both compute in
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float16).float()
    reference = json.loads(Path(theirs).read_text())
    same = 0
    for entry, expected in zip(json.loads(Path(questions).read_text()), reference, strict=True):
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": entry["question"]}]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=prompt, images=Image.open(entry["image"]).convert("RGB"), return_tensors="pt")
        ids = inputs["input_ids"][0].tolist()
        first, count = ids.index(model.config.image_token_id), ids.count(model.config.image_token_id)
        assert [*ids[:first], -200, *ids[first + count :]] == expected["prompt_ids"], "the prompts have different ids"
        assert abs(inputs["pixel_values"].double().sum().item() - expected["pixels"]) < 1e-6, "the pixels differ"
        with torch.no_grad():
            made = model.generate(**inputs, do_sample=False, max_new_tokens=16)[0, len(ids) :].tolist()
        answer = [token for token in expected["answer_ids"] if token != 1 or expected["answer_ids"].index(token)]
        same += made == answer
    distinct = len({tuple(entry["answer_ids"]) for entry in reference})
    print(f"   {Path(theirs).name.split('.')[0]}: {same} of {len(reference)} greedy answers equal ours, {distinct} distinct")
    assert same == len(reference) and distinct > 1


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    {"data": data, "llm": llm, "features": features, "steps": steps, "answers": answers}[command](*arguments)
