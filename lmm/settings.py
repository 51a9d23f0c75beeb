"""Settings of the `lmm` commands as typed dataclasses; a value that cannot be right is refused before anything is loaded.

`StageSettings` describes one stage of LLaVA training. Its defaults are stage 1 of LLaVA-1.5 (projector only, captions);
those of `InstructionTuningSettings` are stage 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal


@dataclass(kw_only=True)
class LlavaParts:
    """What a LLaVA model is built from."""

    vision_tower: Path
    """Encoder folder: a transformers CLIPVisionModel in safetensors with its preprocessor_config.json."""
    llm: Path
    """Language-model folder: any transformers causal language model with a fast tokenizer and a chat template."""
    chat_template: str | None = None
    """`vicuna_v1` or a Jinja file; takes the place of the language model's own chat template."""
    seed: int = 0
    """Seed of the projector's first weights."""


@dataclass(kw_only=True)
class BuildSettings(LlavaParts):
    """Builds a LLaVA model from an encoder folder and a language-model folder."""

    out: Path
    """Folder to write; it must not exist."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Format of the weights written."""


@dataclass
class ImportSettings:
    """Turns a checkpoint of the original LLaVA, or its mm_projector.bin, into a folder that transformers loads."""

    source: Path
    """Checkpoint folder whose config.json has `mm_*` keys, or an `mm_projector.bin` or the folder of one."""
    out: Path | None = None
    """Folder to write; it must not exist."""
    vision_tower: Path | None = None
    """The vision tower's folder; by default the one that the checkpoint names."""
    model_base: Path | None = None
    """For a projector alone: the LLaVA folder to copy, with this projector in the place of its own."""
    chat_template: str = "vicuna_v1"
    """`vicuna_v1`, LLaVA-1.5's own, or a Jinja file."""

    def __post_init__(self) -> None:
        if self.out is None:
            raise ValueError("out: expected the folder to write, as in --out DIR")


@dataclass
class ExportSettings:
    """Writes a LLaVA folder in the format of the original LLaVA."""

    folder: Path
    """LLaVA folder, as `lmm build`, `lmm train` or `lmm import` wrote it."""
    out: Path | None = None
    """Folder to write; it must not exist."""
    format: Literal["llava"] = "llava"
    """The original LLaVA's."""
    part: Literal["all", "projector"] = "all"
    """`projector`: only `mm_projector.bin`, as the original's pretraining stage writes it."""
    mm_vision_tower: str | None = None
    """What the checkpoint names as its vision tower; by default the full path of OUT/vision_tower, which must not move then."""

    def __post_init__(self) -> None:
        if self.out is None:
            raise ValueError("out: expected the folder to write, as in --out DIR")


@dataclass(kw_only=True)
class ConversationSource:
    """Conversations, and where the images are that they name."""

    annotations: Path
    """LLaVA JSON (a list) or JSON lines: `id`, `image` (absent for text only), `conversations`; or the folder of a Hugging
    Face `datasets` table with `messages` and `images`: saved to disk, or parquet or arrow files."""
    images: Path | None = None
    """Folder of the images, a tar with them, or a folder of such tars; member names are the rows' image names. May be left
    out where no row names an image, or a table holds the images themselves."""
    split: str = "train"
    """Split of a table; of no account for JSON."""


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
    """Longest sample in tokens, image tokens included; a longer sample is dropped and counted, never cut."""
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
    """Runs the model through torch.compile; it is compiled anew for a few lengths, and needs a C++ compiler on a CPU."""
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
        for name in ("batch_size", "gradient_accumulation", "max_length", "save_steps", "logging_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        for name in ("learning_rate", "epochs", "projector_learning_rate", "tower_learning_rate", "max_steps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: expected more than 0, found {value}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio: expected a share of at least 0 and below 1, found {self.warmup_ratio}")
        if not 0 <= self.max_drop_fraction <= 1:
            raise ValueError(f"max_drop_fraction: expected a share between 0 and 1, found {self.max_drop_fraction}")
        for name in ("workers", "weight_decay", "gradient_clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, found {getattr(self, name)}")


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


@dataclass(kw_only=True)
class DataChoice:
    """Which conversations to look at, and how they become tokens: those of a recipe, or a file."""

    aliases: ClassVar[dict[str, str]] = {"config": "recipe"}

    recipe: Path | None = None
    """Recipe of `lmm train` or `lmm finetune`, whose data, model, template and max_length are taken."""
    stage: Literal["stage1", "stage2"] | None = None
    """Stage of a recipe of `lmm finetune`; its last one when left out."""
    data: Path | None = None
    """LLaVA JSON or JSON lines, or the folder of a `datasets` table, in place of a recipe."""
    images: Path | None = None
    """Folder, tar or folder of tars with the images of `data`."""
    split: str | None = None
    """Split of a table; train when left out."""
    tokenizer: Path | None = None
    """Folder with a tokenizer: of a LLaVA model, of a language model, or an original Llama one (tokenizer.model)."""
    template: Literal["plain", "vicuna_v1", "chat"] | None = None
    """How a conversation of `data` becomes text, as in `lmm train`; vicuna_v1 when left out."""
    max_length: int | None = None
    """Longest usable sample in tokens, image tokens included."""

    def __post_init__(self) -> None:
        if (self.recipe is None) == (self.data is None):
            raise ValueError("expected either --config RECIPE or --data FILE")
        given = "--data" if self.recipe is None else "--config"
        for name in ("stage",) if self.recipe is None else ("images", "split", "template", "tokens_per_image"):
            if getattr(self, name, None) is not None:
                raise ValueError(f"--{name}: has no say beside {given}. Leave it out.")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length: expected at least 1, found {self.max_length}")


@dataclass(kw_only=True)
class InspectMaskSettings(DataChoice):
    """Prints samples as training sees them, the supervised tokens in colour."""

    n: int | None = None
    """Number of samples, from the first; 5 when left out, all with --json."""
    json: bool = False
    """One JSON object a sample: `id`, `input_ids` with one placeholder an image, `labels`, `supervised` as text; a sample that
    cannot be used has `id` and `dropped`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is not None and self.tokenizer is None:
            raise ValueError("--data needs --tokenizer DIR")
        if self.n is not None and self.n < 1:
            raise ValueError(f"n: expected at least 1, found {self.n}")


@dataclass(kw_only=True)
class CheckDataSettings(DataChoice):
    """Checks every conversation and image, and prints faults by cause, token lengths and supervised tokens."""

    tokens_per_image: int | None = None
    """Image tokens an image; the model's when --tokenizer is a LLaVA folder, else 576 as in LLaVA-1.5."""
    decode: bool = True
    """Decodes every image to its end; `false` only looks at the conversations."""
    workers: int = 2
    """Processes that read and decode."""
    max_drop_fraction: float | None = None
    """The exit status is 2 when a larger share of the samples cannot be used; the recipe's, else 0.01, when left out."""
    out: Path | None = None
    """Folder for `report.json` and `dropped.jsonl`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_drop_fraction is not None and not 0 <= self.max_drop_fraction <= 1:
            raise ValueError(f"max_drop_fraction: expected a share between 0 and 1, found {self.max_drop_fraction}")
        if self.tokens_per_image is not None and self.tokens_per_image < 1:
            raise ValueError(f"tokens_per_image: expected at least 1, found {self.tokens_per_image}")
        if self.workers < 0:
            raise ValueError(f"workers: expected at least 0, found {self.workers}")


@dataclass
class _Answering:
    """What every command that answers with a LLaVA model is told."""

    model: Path
    """LLaVA folder, as `lmm train` writes it."""

    def _check(self) -> None:
        for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("workers", 1), ("temperature", 0), ("max_upload_mb", 1)):
            if getattr(self, name, least) < least:
                raise ValueError(f"{name}: expected at least {least}, found {getattr(self, name)}")


@dataclass
class GenerateSettings(_Answering):
    """Answers a file of questions in batches; an interrupted run goes on where it stopped."""

    questions: Path | None = None
    """JSON lines: `question_id`, `text`, and `image` (a path or a list; absent for text only); or `messages` for `text`."""
    out: Path | None = None
    """File of answers (JSON lines, in the order of the questions); finished answers of the same run are reused."""
    images: Path | None = None
    """Folder that image paths are relative to."""
    batch_size: int = 8
    """Questions answered at a time; in float32 it does not change an answer."""
    max_new_tokens: int = 256
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token; above, tokens are drawn, from a seed of each question's own."""
    seed: int = 0
    """Seed of what is drawn."""
    max_drop_fraction: float = 0.0
    """Nothing is answered when a larger share of the questions cannot be."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the weights; `auto` is float32 on a CPU and the folder's own format on a GPU."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, ...; `auto` takes the GPU when there is one."""
    workers: int = 4
    """Threads that check the images."""

    def __post_init__(self) -> None:
        for name in ("questions", "out"):
            if getattr(self, name) is None:
                raise ValueError(f"--{name} FILE.jsonl is required")
        if not 0 <= self.max_drop_fraction <= 1:
            raise ValueError(f"max_drop_fraction: expected a share between 0 and 1, found {self.max_drop_fraction}")
        self._check()


@dataclass
class ChatSettings(_Answering):
    """Talks with a LLaVA model in the terminal."""

    image: Path | None = None
    """Image that the first question is about; `/image FILE` adds others."""
    max_new_tokens: int = 512
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token; above, tokens are drawn."""
    seed: int = 0
    """Seed of what is drawn."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the weights; `auto` is float32 on a CPU and the folder's own format on a GPU."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, ...; `auto` takes the GPU when there is one."""

    def __post_init__(self) -> None:
        self._check()


@dataclass
class ServeSettings(_Answering):
    """Opens a page on this machine to ask a LLaVA model about images, or two of them side by side."""

    by_position: ClassVar[tuple[str, ...]] = ("against",)

    against: Path | None = None
    """Second LLaVA folder, answering beside the first; may be given by position."""
    port: int = 7860
    """Port on 127.0.0.1; 0 takes a free one."""
    max_new_tokens: int = 512
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token; above, tokens are drawn."""
    seed: int = 0
    """Seed of what is drawn."""
    max_upload_mb: int = 20
    """Largest file that may be uploaded, in megabytes."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the weights; `auto` is float32 on a CPU and the folder's own format on a GPU."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, ...; `auto` takes the GPU when there is one."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port: expected 0 to 65535, found {self.port}")
        self._check()
