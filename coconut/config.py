"""The schema of every command: dataclasses that check themselves when they are built.

Hydra composes conf/ into these. Nothing here knows torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from coconut.methods import Curriculum, PromptFormat, plan
from coconut.utils.overrides import Kind, PathName, Place, map_texts

# These say where and how a run is carried out, not what it is: they do not enter its name, and a run
# may be resumed with others. The test file is never opened in training.
NOT_IDENTITY = (
    "run", "resume", "keep_checkpoints", "keep_every", "save_every", "data.cache_dir", "data.test", "launch",
    "tracking", "micro_batch_size", "eval_batch_size", "rollout_batch_size", "engine.kind", "engine.device",
    "engine.threads", "engine.activation_checkpointing", "engine.cuda_graphs", "engine.timeout", "engine.zero_stage",
    "engine.offload_optimizer", "engine.offload_parameters",
)  # fmt: skip


class Task(StrEnum):
    gsm8k = "gsm8k"
    prontoqa = "prontoqa"
    prosqa = "prosqa"
    pointers = "pointers"


TASK_NAMES = ", ".join(Task)


class Precision(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"  # autocast over float32 weights


class TooLong(StrEnum):
    error = "error"
    skip = "skip"


class Unreadable(StrEnum):
    """What is done with rows whose gold answer would be judged wrong."""

    error = "error"
    skip = "skip"


class Reset(StrEnum):
    """When the optimizer is made anew."""

    stage = "stage"
    epoch = "epoch"
    never = "never"


class Resume(StrEnum):
    auto = "auto"  # go on where the run's folder left off
    never = "never"  # refuse a folder that already holds a run


def at_least(owner: str, config: Any, **bounds: float) -> None:
    for name, least in bounds.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{owner}{name} is {value}; it must be at least {least}.")


@dataclass
class LoraConfig:
    """Train a low-rank correction of linear layers in place of the model; `rank` 0 trains the model itself.

    A correction is scaled by alpha / rank; `alpha` is by default twice the rank. `targets`: names of layers,
    or ends of them (q_proj, attn.c_proj); by default all linear layers but the head.
    """

    rank: int = 0
    alpha: float | None = None
    dropout: float = 0.0
    targets: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        at_least("model.lora.", self, rank=0)
        if self.rank == 0:
            for name in ("alpha", "dropout", "targets"):
                if value := getattr(self, name):
                    raise ValueError(f"model.lora.{name}={value} needs LoRA. Set model.lora.rank, for example to 16.")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"model.lora.alpha is {self.alpha}; it must be above 0.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.lora.dropout is {self.dropout}; it must be in [0, 1).")


WORDS = "words"  # the tokenizer of words


@dataclass
class ModelConfig:
    """A pretrained model by name or folder (`base`), or a new one from its `architecture`.

    `architecture` holds the arguments of the transformers config of its `model_type`. `tokenizer` is a
    name or folder, or "words" for a word-level one made from the training file; by default the base's.
    `new_tokens`: what the embeddings of added tokens start from: mean, random, or a token's name.
    """

    base: Place | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    tokenizer: Place | None = None
    new_token_init: str = "mean"
    attention: str | None = None  # transformers' attn_implementation; by default what it takes for the model
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        if bool(self.base) == bool(self.architecture):
            given = "both are given" if self.base else "neither is given"
            raise ValueError(
                f"The model is either pretrained (model.base) or new (model.architecture); {given}. "
                "For a pretrained one, also in place of an experiment's own: model=gpt2, or model=gpt2 "
                "model.base=NAME_OR_FOLDER. For a new one: model=gpt2_new or model=tiny."
            )
        if self.architecture and "model_type" not in self.architecture:
            raise ValueError(f"model.architecture names no model_type; its keys are {list(self.architecture)}.")
        if self.architecture and not self.tokenizer:
            raise ValueError("A new model needs model.tokenizer: a name or folder, or words.")


NOT_BUILT = ("out_dir", "name", "source", "train", "valid", "test", "compare")


@dataclass
class DataConfig:
    """A file for each split, or `files`, what the names of all three begin with, or `build`.

    `files` is what a builder was given as OUT_DIR/NAME. `build`: keys of the task's builder, which makes
    the data once, into the cache, if no file to train on is named. `test` takes the place of either's test file.
    """

    task: Task | None = None  # how answers are judged
    train: PathName = ""
    valid: PathName = ""
    test: PathName = ""
    prefix: PathName = ""
    build: dict[str, Any] = field(default_factory=dict)
    too_long: TooLong = TooLong.error  # an example longer than the model's context
    unreadable: Unreadable = Unreadable.error  # one whose gold answer would be judged wrong
    format: PromptFormat = field(default_factory=PromptFormat)
    cache_dir: PathName | None = None  # of tokens and of data made; by default COCONUT_CACHE or ~/.cache/coconut

    def __post_init__(self) -> None:
        named = {split: getattr(self, split) for split in NEEDED if getattr(self, split)}
        self.build = {key: value for key, value in self.build.items() if value is not None}
        if self.prefix and named:
            split, file = next(iter(named.items()))
            raise ValueError(f"data.prefix={self.prefix} and data.{split}={file} are both given. Keep one of them.")
        if self.prefix or named:
            self.build = {}  # nothing is built, so it is no part of what the run is
        for key in NOT_BUILT:
            if key in self.build:
                raise ValueError(
                    f"data.build.{key}={self.build[key]}: data.build says how rows are made. For files, name them "
                    "with data.train, data.valid and data.test."
                )
        for key in ("num_train", "num_valid"):
            if self.build.get(key) == 0:
                raise ValueError(f"data.build.{key} is 0, and a run needs such rows. Leave it out, or raise it.")
        if self.build and not self.task:
            raise ValueError(f"data.build={self.build}, of which task? Set data.task to one of {TASK_NAMES}.")
        if (hub := self.build.get("hub")) and Path(hub).exists():
            raise ValueError(
                f"data.build.hub={hub} is a folder here, whose content may change. Convert it once with python -m "
                f"data_builders.{self.task} hub={hub}, and name the files with data.prefix=data/{self.task}."
            )

    def judged(self) -> Task:
        """The task that says how answers are judged. Raises ValueError if there is none."""
        if not self.task:
            raise ValueError(
                f"data.task is missing: how are answers judged? Set it to one of {TASK_NAMES}. gsm8k compares numbers, "
                "prontoqa True and False, prosqa and pointers text."
            )
        return self.task


SPLITS = ("train", "valid", "test")
NEEDED = ("train", "valid")  # by a training


@dataclass
class AdamWConfig:
    """`warmup` counts updates from each time that the optimizer is made; `clip` 0 means no clipping."""

    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.01
    warmup_steps: int = 0
    max_grad_norm: float = 0.0

    def __post_init__(self) -> None:
        at_least("optimizer.", self, weight_decay=0, warmup_steps=0, max_grad_norm=0)
        self._above_zero("lr")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}; it must be in [0, 1).")

    def _above_zero(self, name: str) -> None:
        if (rate := getattr(self, name)) is not None and not rate > 0:
            raise ValueError(f"optimizer.{name} is {rate}; it must be above 0.")

    def learning_rate(self, updates: int) -> float:
        """For the update after so many since the optimizer was made: constant after a linear warm-up."""
        return self.lr * self._warmed_up(updates)

    def _warmed_up(self, updates: int) -> float:
        return min(1.0, (updates + 1) / max(self.warmup_steps, 1))


@dataclass
class OptimizerConfig(AdamWConfig):
    """AdamW through the stages of a curriculum. `later_lr`: the learning rate from stage 1 on, if it is another one."""

    later_stage_lr: float | None = None
    reset_every: Reset = Reset.stage

    def __post_init__(self) -> None:
        super().__post_init__()
        self._above_zero("later_stage_lr")

    def learning_rate(self, updates: int, stage: int = 0) -> float:
        """As it is in this stage."""
        return (self.later_stage_lr if stage and self.later_stage_lr else self.lr) * self._warmed_up(updates)


class EngineKind(StrEnum):
    local = "local"  # one device; on several processes DistributedDataParallel
    deepspeed = "deepspeed"  # ZeRO


@dataclass
class EngineConfig:
    """`device`: auto, cpu, cuda, cuda:1, mps; on several processes each takes a GPU of its own.

    `threads`: CPU threads of a process, 0 for its share of the cores. `cuda_graphs`: whether a GPU starts the passes of
    a batch as one (CUDA graphs); where device=auto finds none, a warning is given. `timeout`: seconds after which a
    process of several that does not get on ends the run. The rest is for DeepSpeed: ZeRO's stage (1 shards
    the optimizer, 2 the gradients too, 3 the weights too), and what stays in the memory of the host.
    """

    kind: EngineKind = EngineKind.local
    device: str = "auto"
    precision: Precision = Precision.float32
    threads: int = 0
    activation_checkpointing: bool = False
    cuda_graphs: bool = False
    timeout: float = 600
    zero_stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False

    def __post_init__(self) -> None:
        at_least("engine.", self, threads=0, timeout=1)
        if self.kind is EngineKind.local:
            for name in ("zero_stage", "offload_optimizer", "offload_parameters"):
                if value := getattr(self, name):
                    raise ValueError(f"engine.{name}={value} needs DeepSpeed. Add engine=deepspeed.")
        if self.zero_stage not in range(4):
            raise ValueError(f"engine.zero_stage is {self.zero_stage}; it is 0, 1, 2 or 3.")
        deepspeed = self.kind is EngineKind.deepspeed
        if self.cuda_graphs and (self.device == "mps" or self.device.startswith("cpu")):
            raise ValueError(
                f"engine.cuda_graphs=true is for a GPU of NVIDIA's, and engine.device is {self.device}. Set "
                "engine.cuda_graphs=false, or engine.device=cuda."
            )
        if self.cuda_graphs and (deepspeed or self.activation_checkpointing):
            what = "engine=local" if deepspeed else "engine.activation_checkpointing=false"
            raise ValueError(
                f"engine.cuda_graphs=true needs {what}: what runs then is not in the graph. Set one of the two."
            )
        if deepspeed and self.precision is Precision.bfloat16 and self.zero_stage < 1:
            raise ValueError(
                "engine.precision=bfloat16 keeps float32 master weights, which DeepSpeed does with "
                "engine.zero_stage=1, 2 or 3. Choose one of them, or engine=local."
            )
        if self.offload_optimizer and self.zero_stage < 1:
            raise ValueError("engine.offload_optimizer needs the optimizer sharded: engine.zero_stage=1, 2 or 3.")
        if self.offload_parameters and self.zero_stage < 3:
            raise ValueError(
                f"engine.offload_parameters needs the weights sharded, and engine.zero_stage is {self.zero_stage}. "
                "Set engine.zero_stage=3."
            )


def refuse_cuda_graphs(engine: EngineConfig, trained: str) -> None:
    """Raise ValueError if they are asked for where nothing would be recorded: what is trained so is in eval()."""
    if engine.cuda_graphs:
        raise ValueError(
            f"engine.cuda_graphs=true records the passes of a model that is trained with its dropout, and {trained} is "
            "trained without. Leave engine.cuda_graphs=false."
        )


class Tracker(StrEnum):
    """Where a run's numbers go besides metrics.jsonl."""

    none = "none"
    wandb = "wandb"
    tensorboard = "tensorboard"


class TrackingMode(StrEnum):
    online = "online"
    offline = "offline"  # into the run's folder; `wandb sync` sends it later


@dataclass
class TrackingConfig:
    """`project`, `entity`, `name`, `group` and `tags` are W&B's; the name is by default that of the run's folder.

    `wait`: seconds that the end of training waits at most for the tracker.
    """

    tracker: Tracker = Tracker.none
    mode: TrackingMode = TrackingMode.online
    project: str = "coconut"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    finish_timeout: float = 60

    def __post_init__(self) -> None:
        at_least("tracking.", self, finish_timeout=1)
        if self.tracker is Tracker.none and self.mode is TrackingMode.offline:
            raise ValueError("tracking.mode=offline says nothing of where to. Add tracking=wandb.")
        if not self.project or set(self.project) & set("/\\#?%:"):
            raise ValueError(f"tracking.project is {self.project!r}; W&B takes a name without / \\ # ? % and :.")


@dataclass
class LaunchConfig:
    """The processes that the command starts on this machine to do the work.

    `num_processes`: null for one a GPU. `grace`: seconds that they have to save when they are asked to stop.
    """

    num_processes: int | None = 1
    grace: int = 300

    def __post_init__(self) -> None:
        at_least("launch.", self, num_processes=1, grace=1)


@dataclass
class RunConfig:
    """What every training has: where it lies, on what it is, and how it is carried out."""

    name: str = "custom"  # of the experiment; part of the run's default folder
    run: PathName | None = None  # the run's folder; by default runs/NAME-KIND-seedN-HASH
    resume: Resume = Resume.auto
    init: Place | None = None  # a run or checkpoint whose weights to start from
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    max_new_tokens: int | None = None  # by default room for the longest gold text, and at least the task's
    micro_batch_size: int | None = None  # examples or answers a forward pass of one process; by default its whole share
    eval_batch_size: int = 64
    valid_limit: int | None = None  # validate on the first so many examples
    keep_checkpoints: int = 2  # the newest ones; the best one stays in any case
    keep_every: int = 0  # a checkpoint at each multiple is written and stays

    def __post_init__(self) -> None:
        at_least("", self, seed=0, max_new_tokens=1, eval_batch_size=1, valid_limit=1, keep_checkpoints=1, keep_every=0)
        named = [split for split in NEEDED if getattr(self.data, split)]
        for split in NEEDED:
            if split not in named and not self.data.prefix and (named or not self.data.build):
                raise ValueError(
                    f"data.{split} names no file. Set data.{split}=FILE, or choose data=graphs or another and name no "
                    "file at all: it is then made."
                )

    def folder(self) -> Path:
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()
        return Path(self.run or f"runs/{self.name}-{self.kind}-seed{self.seed}-{digest[:8]}")

    @property
    def kind(self) -> str:
        """What sets the run apart from others of its experiment, in its default folder's name."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What makes the run this run."""
        return identity(asdict(self), type(self))


@dataclass
class TrainConfig(RunConfig):
    method: str = "coconut"
    curriculum: Curriculum = field(default_factory=Curriculum)
    model: ModelConfig = field(default_factory=lambda: ModelConfig(base="openai-community/gpt2"))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch_size: int = 128  # examples an update, over all processes
    validate_every: int = 0  # updates; 0: at the end of each epoch. Always at the end of a stage
    save_every: int = 0  # updates between further checkpoints; 0: only with each validation

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data.judged()
        at_least("", self, batch_size=1, micro_batch_size=1, validate_every=0, save_every=0)
        if self.model.lora.rank and not (self.model.base or self.init):
            raise ValueError(
                f"model.lora.rank={self.model.lora.rank} corrects a pretrained model, and model.architecture makes a "
                "new one. Set model.base=NAME_OR_FOLDER or init=RUN, or leave LoRA out."
            )
        plan(self.method, self.curriculum)

    @property
    def kind(self) -> str:
        return self.method


def locate(config: RunConfig) -> None:
    """Name every file and folder that the run keeps so that it is found from any folder; `run` stays as it is.

    A name that may be one of the Hugging Face hub is a folder if there is one.
    """

    def absolute(key: str, kind: Kind, text: str) -> str:
        is_path = kind.tag == "path" and key != "run"
        is_folder = kind.tag == "place" and text != WORDS and Path(text).exists()
        return str(Path(text).resolve()) if text and (is_path or is_folder) else text

    map_texts(config, absolute)


def identity(config: dict[str, Any], schema: type[RunConfig] = TrainConfig) -> dict[str, Any]:
    """What makes a run this run: its configuration but for NOT_IDENTITY.

    A key that there was not yet when the run began has its default.
    """
    parts: dict[str, Any] = {f.name: f.default_factory() for f in fields(schema) if callable(f.default_factory)}
    return _but_for_how(_completed(config, {name: asdict(part) for name, part in parts.items()}))


def _completed(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    found = {**defaults, **config}
    return {
        key: _completed(value, defaults[key])
        if isinstance(value, dict) and isinstance(defaults.get(key), dict) and defaults[key]
        else value
        for key, value in found.items()
    }


def _but_for_how(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    return {
        key: _but_for_how(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in config.items()
        if f"{prefix}{key}" not in NOT_IDENTITY
    }


@dataclass
class DataFiles:
    """Files to take in place of those that the run was made with."""

    train: PathName | None = None
    valid: PathName | None = None
    test: PathName | None = None


def needs_run(run: str) -> None:
    if not run:
        raise ValueError("Name the run: run=DIR, the folder that coconut.train wrote.")
