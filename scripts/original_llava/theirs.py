"""The original LLaVA's side of scripts/check_original_llava.sh; runs in its environment (llava-torch, transformers 4.37.2).

`llm TEXT OUT` trains a SentencePiece tokenizer on TEXT and writes a tiny Llama; `features TOWER IMAGE OUT` and
`answers CHECKPOINT QUESTIONS OUT` write what the original's own code gives; `train ...` is its training with its own options.
"""

import json
import sys
from pathlib import Path

import sentencepiece
import torch
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.train.train import train
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

HIDDEN = 64


def llm(text: str, out: str) -> None:
    folder = Path(out)
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=text, model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=700, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
    )  # fmt: skip
    tokenizer = LlamaTokenizer(str(folder / "tokenizer.model"), legacy=False)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def features(tower: str, image: str, out: str) -> None:
    class Arguments:
        mm_vision_select_layer = -2
        mm_vision_select_feature = "patch"

    encoder = CLIPVisionTower(tower, args=Arguments)
    pixels = encoder.image_processor.preprocess(Image.open(image).convert("RGB"), return_tensors="pt")["pixel_values"]
    Path(out).write_text(json.dumps(encoder(pixels)[0].tolist()))


def answers(checkpoint: str, questions: str, out: str) -> None:
    """Greedy, 16 new tokens. The loader reads float16; the computation is in float32, so that rounding decides nothing."""
    tokenizer, model, image_processor, _ = load_pretrained_model(
        checkpoint, None, Path(checkpoint).name, device="cpu", device_map="cpu"
    )
    model.float()
    found = []
    for entry in json.loads(Path(questions).read_text()):
        conversation = conv_templates["vicuna_v1"].copy()
        conversation.append_message(conversation.roles[0], DEFAULT_IMAGE_TOKEN + "\n" + entry["question"])
        conversation.append_message(conversation.roles[1], None)
        ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
        pixels = process_images([Image.open(entry["image"]).convert("RGB")], image_processor, model.config)
        with torch.inference_mode():
            made = model.generate(ids, images=pixels.float(), do_sample=False, max_new_tokens=16, use_cache=True)
        found.append({"prompt_ids": ids[0].tolist(), "pixels": pixels.double().sum().item(), "answer_ids": made[0].tolist()})
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "train":
        sys.argv = [sys.argv[0], *arguments]
        train()
    else:
        {"llm": llm, "features": features, "answers": answers}[command](*arguments)
