"""Pretraining of an image encoder against the fixed embeddings of a frozen LLM text encoder (LIFT), and of the CLIP baseline.

Captions come in, an embedding store and an encoder folder that transformers loads go out. Imports neither `lmm` nor `eval`.
"""
