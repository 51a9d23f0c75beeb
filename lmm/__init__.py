"""LLaVA: joining an encoder with a language model, training under DeepSpeed, and writing what plain transformers loads."""
