"""Settings of training.

`StageSettings` describes one stage of LLaVA training. Its defaults are stage 1 of LLaVA-1.5 (projector only, captions);
those of `InstructionTuningSettings` are stage 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lift.common.checks import at_least, share
from lmm.settings.data import ConversationSource
from lmm.settings.models import LlavaParts


@dataclass(kw_only=True)
class LoraSettings:
    """Low-rank adapters on the language model (LoRA, arXiv 2106.09685), trained in place of its weights."""

    rank: int = 128
    """Rank of the update of each adapted matrix; LLaVA-1.5's is 128."""
    alpha: float = 256.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.05
    """Dropout on the adapters' input."""
    targets: list[str] | None = None
    """Names of the linear layers to adapt, such as `q_proj`; all of the language model's (not its head) when left out."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"lora: expected rank of at least 1 and alpha above 0, found {self.rank} and {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout: expected a share of at least 0 and below 1, found {self.dropout}")
        if self.targets is not None and not self.targets:
            raise ValueError("lora.targets: expected at least one layer name; leave it out to adapt all linear layers")


@dataclass(kw_only=True)
class StageSettings:
    """Settings of one training stage."""

    data: list[ConversationSource] = field(default_factory=list)
    """Conversation files; their samples are joined."""
    trainable: Literal["projector", "projector_and_llm", "all"] = "projector"
    """What learns; `all` adds the vision tower, which is frozen otherwise."""
    template: Literal["plain", "chat", "vicuna_v1"] = "plain"
    """How a conversation becomes text: image and caption only, the model's own chat template, or LLaVA-1.5's."""
    image_aspect_ratio: Literal["pad", "crop", "resize"] = "pad"
    """`pad`: to a square with the mean colour, as in LLaVA; `crop`: shorter side resized, centre crop; `resize`: to the
    square, proportions not kept. Saved in the model."""
    epochs: float = 1.0
    """Passes over the data; ignored when max_steps is set."""
    max_steps: int | None = None
    """Number of optimizer steps."""
    batch_size: int = 16
    """Samples per device and micro-batch."""
    gradient_accumulation: int = 1
    """Micro-batches per optimizer step."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    projector_learning_rate: float | None = None
    """Peak learning rate of the projector; the same as learning_rate when left out."""
    tower_learning_rate: float | None = None
    """Peak learning rate of the vision tower under `trainable: all`; the same as learning_rate when left out."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW, or bitsandbytes' with its two moments in 8 bits (arXiv 2110.02861)."""
    lora: LoraSettings | None = None
    """Trains low-rank adapters in place of the language model's weights; the result is an adapter folder for `lmm merge`."""
    quantise: Literal["none", "nf4", "int8"] = "none"
    """Holds the language model's frozen weights in 4 or 8 bits by bitsandbytes (QLoRA, arXiv 2305.14314); needs lora."""
    weight_decay: float = 0.0
    """AdamW weight decay (not on biases and norms)."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    warmup_ratio: float = 0.03
    """Share of the steps with linearly rising learning rate, followed by a cosine decay to 0."""
    max_length: int = 2048
    """Longest sample in tokens, image tokens included."""
    over_long: Literal["drop", "cut"] = "drop"
    """What a longer sample is: one more dropped sample, or `cut` at max_length and counted, as in the original LLaVA; a sample
    is never cut within or before an image, but dropped."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Compute precision; bf16 keeps float32 master weights in the optimizer and writes bf16."""
    batching: Literal["random", "grouped"] = "random"
    """`grouped`: the samples of an optimizer step are alike in length, and with or without images; less padding."""
    packing: bool = False
    """Puts several samples of a micro-batch in one row of at most max_length tokens; they do not see each other."""
    cache_features: Path | None = None
    """Folder of the vision tower's features (2 bytes each), computed once; only while the tower is frozen."""
    gradient_checkpointing: bool = False
    """Recomputes activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Runs the model through torch.compile, anew for a few lengths: for long runs on a GPU. On a CPU, where it needs a C++
    compiler, compiling takes longer than it saves."""
    use_liger_kernel: bool = False
    """Liger's kernels with the linear layer and cross-entropy of the loss fused, so that no logits are kept; CUDA only."""
    zero_stage: Literal[2, 3] = 2
    """DeepSpeed ZeRO stage, with the configuration shipped in lmm/deepspeed_configs."""
    offload: bool = False
    """ZeRO-3 with parameters and optimizer states in the CPU's memory."""
    deepspeed: Path | None = None
    """DeepSpeed JSON file that takes the place of the shipped one."""
    seed: int = 0
    """Seed of the sample order and of dropout."""
    workers: int = 2
    """Processes that read and preprocess images, per device."""
    save_steps: int = 500
    """Optimizer steps between checkpoints."""
    logging_steps: int = 10
    """Optimizer steps between log lines."""
    max_drop_fraction: float = 0.01
    """The run stops before training when a larger share of the samples cannot be used."""
    unsupervised: Literal["error", "drop"] = "error"
    """What a sample without any supervised token is: an error before training, or one more dropped sample."""

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size", "gradient_accumulation", "max_length", "save_steps", "logging_steps")
        for name in ("learning_rate", "epochs", "projector_learning_rate", "tower_learning_rate", "max_steps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: expected more than 0, found {value}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio: expected a share of at least 0 and below 1, found {self.warmup_ratio}")
        share(self, "max_drop_fraction")
        at_least(self, 0, "workers", "weight_decay", "gradient_clip")


@dataclass(kw_only=True)
class InstructionTuningSettings(StageSettings):
    """Settings of stage 2: projector and language model learn on conversations, with the learning rate of LLaVA-1.5."""

    trainable: Literal["projector", "projector_and_llm", "all"] = "projector_and_llm"
    """What learns; `all` adds the vision tower, which is frozen otherwise."""
    template: Literal["plain", "chat", "vicuna_v1"] = "chat"
    """How a conversation becomes text: image and caption only, the model's own chat template, or LLaVA-1.5's."""
    learning_rate: float = 2e-5
    """Peak learning rate."""


@dataclass(kw_only=True)
class TrainSettings(StageSettings):
    """Trains one stage of a LLaVA model under DeepSpeed."""

    model: Path
    """LLaVA folder to start from, as `lmm build` or an earlier stage wrote it."""
    out: Path
    """Folder to write; until it is complete, checkpoints lie in OUT.training, from which the same command goes on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ValueError('data: expected at least one source, as in --data \'[{"annotations": FILE, "images": FOLDER}]\'')


@dataclass
class MergeSettings:
    """Merges the adapters that `lmm train` wrote with `lora` into their base: a plain LLaVA folder."""

    adapter: Path
    """Adapter folder, as `lmm train` wrote it."""
    out: Path | None = None
    """Folder to write, ADAPTER-merged when left out; it must not exist."""
    base: Path | None = None
    """The LLaVA folder the adapters were trained on, where it has moved since."""
    precision: Literal["fp32", "bf16"] | None = None
    """Format of the weights written; that of the training when left out. The sum itself is always done in float32."""


@dataclass(kw_only=True)
class FinetuneSettings(LlavaParts):
    """Builds a LLaVA model and trains both stages, reusing every finished part whose inputs and settings are the same."""

    out: Path
    """Folder for `build`, `stage1` and `stage2`."""
    stage1: StageSettings = field(default_factory=StageSettings)
    """Alignment: the projector learns on captions."""
    stage2: InstructionTuningSettings | None = field(default_factory=InstructionTuningSettings)
    """Instruction tuning; `null` stops after stage 1."""

    def __post_init__(self) -> None:
        for name, stage in (("stage1", self.stage1), ("stage2", self.stage2)):
            if stage is not None and not stage.data:
                raise ValueError(f'{name}.data: expected at least one source: [{{"annotations": FILE, "images": FOLDER}}]')
        if self.stage1.lora and self.stage2 is not None:
            raise ValueError("stage1.lora: stage 2 starts from a whole model. Give lora to stage 2, or set stage2 to null.")
