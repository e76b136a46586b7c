"""Configuration shared by the commands: dataclasses that check their values in `__post_init__`.

Hydra composes conf/ into these. torch is not imported here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from coconut.methods import At, Content, Curriculum, Plan, Pooling, Projector, PromptFormat, Update, plan
from coconut.utils.overrides import Kind, PathName, Place, Template, Text, as_arguments, map_texts

# Keys that say where and how a run is executed, and do not change what it computes: they are no part of the hash in
# its default folder's name, and may differ when it is resumed. (The test file is never opened in training.)
NOT_IDENTITY = (
    "run", "resume", "dry_run", "keep_checkpoints", "keep_every", "save_every", "data.cache_dir", "data.test", "launch",
    "tracking", "micro_batch_size", "eval_batch_size", "rollout_batch_size", "engine.kind", "engine.device",
    "engine.threads", "engine.acceleration", "engine.activation_checkpointing", "engine.cuda_graphs", "engine.timeout",
    "engine.zero_stage", "engine.offload_optimizer", "engine.offload_parameters",
)  # fmt: skip


class TaskName(StrEnum):
    gsm8k = "gsm8k"
    prontoqa = "prontoqa"
    prosqa = "prosqa"
    pointers = "pointers"
    numbers = "numbers"
    letters = "letters"
    yes_no = "yes_no"
    math = "math"


BUILT = (TaskName.gsm8k, TaskName.prontoqa, TaskName.prosqa, TaskName.pointers)  # tasks with a builder of that name
TASK_NAMES = ", ".join(TaskName)


class Precision(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"  # autocast over float32 weights


class TooLong(StrEnum):
    error = "error"
    skip = "skip"


class Unreadable(StrEnum):
    """What to do with rows whose gold answer the task itself would judge wrong."""

    error = "error"
    skip = "skip"


class Reset(StrEnum):
    """When the optimizer is created anew."""

    stage = "stage"
    epoch = "epoch"
    never = "never"


class Decay(StrEnum):
    """How the learning rate falls."""

    none = "none"
    cosine = "cosine"  # to 0 at the end of the run


class Resume(StrEnum):
    auto = "auto"  # resume the run in the folder, if there is one
    never = "never"  # refuse a folder that already holds a run


def at_least(prefix: str, config: Any, **bounds: float) -> None:
    for name, least in bounds.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{prefix}{name} is {value}; it must be at least {least}.")


@dataclass
class LoraConfig:
    """LoRA: train low-rank corrections of linear layers instead of the weights. `rank` 0 turns it off.

    A correction is scaled by alpha / rank; `alpha` is by default twice the rank. `targets`: names of layers, or
    suffixes of names (q_proj, attn.c_proj); by default all linear layers except the head. `train_tokens`: whether the
    embeddings of the added tokens are trained too.
    """

    rank: int = 0
    alpha: float | None = None
    dropout: float = 0.0
    targets: list[str] = field(default_factory=list)
    train_tokens: bool = True

    def __post_init__(self) -> None:
        at_least("model.lora.", self, rank=0)
        if self.rank == 0:
            for name, default in (("alpha", None), ("dropout", 0.0), ("targets", []), ("train_tokens", True)):
                if (value := getattr(self, name)) != default:
                    raise ValueError(f"model.lora.{name}={value} needs LoRA. Set model.lora.rank, for example to 16.")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"model.lora.alpha is {self.alpha}; it must be above 0.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.lora.dropout is {self.dropout}; it must be in [0, 1).")


WORDS = "words"  # value of model.tokenizer: a word-level tokenizer made from the training file


@dataclass
class ModelConfig:
    """A pretrained model by name, folder or GGUF file (`base`), or a new one from its `architecture`.

    `architecture` holds the arguments of the transformers config of its `model_type`. `tokenizer` is a
    name or folder, or "words" for a word-level one made from the training file; by default the base's.
    `new_token_init`: initial embedding of the added tokens: mean, random, or the token to copy it from. `projector`: of
    the thoughts, and the width of its hidden layer; by default the method's, as wide as the model. `update`: how the
    thoughts get their inputs, and `iterations`: how often, of those that are updated all at once; by default the
    method's. `content`: what a thought is made of. `top_k` and `mixture_temperature`: of mixtures of words. `alpha` and
    `layer`: the weight and the layer of the hidden state in fused thoughts (`Slot`); by default the method's. Of
    thoughts that are merged from the chain (colar, c_mtp) `group`: from how many tokens in generation, and in training
    unless `max_group` draws 1 to so many; `pooling`: how; `thought_scale`: what a Gaussian head's predictions are
    divided by.
    """

    base: Place | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    tokenizer: Place | None = None
    new_token_init: str = "mean"
    attention: str | None = None  # transformers' attn_implementation; by default what it takes for the model
    projector: Projector | None = None
    projector_width: int | None = None
    update: Update | None = None
    iterations: int | None = None
    content: Content | None = None
    top_k: int | None = None
    mixture_temperature: float | None = None
    alpha: float | None = None
    layer: int | None = None
    group: int | None = None
    max_group: int | None = None
    pooling: Pooling | None = None
    thought_scale: float | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        at_least("model.", self, projector_width=1, iterations=0, group=1, max_group=0)
        if self.thought_scale is not None and not self.thought_scale > 0:
            raise ValueError(f"model.thought_scale is {self.thought_scale}; it must be above 0.")
        if bool(self.base) == bool(self.architecture):
            problem = "both are given" if self.base else "neither is given"
            raise ValueError(
                f"The model is either pretrained (model.base) or new (model.architecture); {problem}. For a "
                "pretrained one, set model=gpt2, or model=gpt2 model.base=NAME_OR_FOLDER; this also replaces an "
                "experiment's model. For a new one: model=gpt2_new or model=tiny."
            )
        if self.architecture and "model_type" not in self.architecture:
            raise ValueError(f"model.architecture has no model_type; its keys are {list(self.architecture)}.")
        if self.architecture and not self.tokenizer:
            raise ValueError("A new model needs model.tokenizer: a name or folder, or words.")


@dataclass
class ColumnNames:
    """The columns of a file that hold question, answer and steps; by default those of these names.

    Without a column `steps` there are none. A dot leads into nested values, a number into lists: `answers.text.0`.
    """

    question: str | None = None
    answer: str | None = None
    steps: str | None = None


class Division(StrEnum):
    """Parts of a text that are steps."""

    lines = "lines"
    sentences = "sentences"  # lines, and within them what follows a full stop, ! or ? and a space


@dataclass
class StepRule:
    """How a text is divided into steps: at a separator, at matches of a regular expression, or by default into lines.

    `mark`: it stands in the answer's column before the answer itself. The chain is what precedes it, unless there is a
    column for the steps.
    """

    separator: Template | None = None
    pattern: Text | None = None
    into: Division | None = None
    mark: Text | None = None

    def __post_init__(self) -> None:
        given = [f"steps.{key}" for key in ("separator", "pattern", "into") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given: a text is divided in one way. Keep one of them.")
        for key in ("separator", "pattern", "mark"):
            if getattr(self, key) == "":
                raise ValueError(f"steps.{key} is empty. Leave it out, or give the text.")
        try:
            if self.pattern and re.fullmatch(self.pattern, ""):
                raise ValueError(f"steps.pattern={self.pattern} matches an empty text, which is between all letters.")
        except re.error as error:
            raise ValueError(f"steps.pattern={self.pattern} is no regular expression: {error}.") from None


class BadRows(StrEnum):
    """What to do with rows of a file from which no example can be made."""

    error = "error"
    skip = "skip"


@dataclass(kw_only=True)
class RowRule:
    """How the rows of a file become examples, if the file is not in the project's own format.

    `keep`: further columns to keep beside question, steps and answer.
    """

    columns: ColumnNames = field(default_factory=ColumnNames)
    steps: StepRule = field(default_factory=StepRule)
    keep: list[str] = field(default_factory=list)
    bad_rows: BadRows = BadRows.error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RowRule:
        """The rule among the values of a `data` section, which may lack it."""
        steps = dict(values.get("steps") or {})
        return RowRule(
            columns=ColumnNames(**(values.get("columns") or {})),
            steps=StepRule(**steps | {"into": Division(steps["into"]) if steps.get("into") else None}),
            keep=list(values.get("keep") or ()),
            bad_rows=BadRows(values.get("bad_rows") or BadRows.error),
        )

    def rule(self) -> dict[str, Any]:
        """The keys of the rule that are set, as text and lists; {} if none is."""
        ours = {f.name for f in fields(RowRule)}
        whole = {key: value for key, value in asdict(self).items() if key in ours}
        return _set_keys(json.loads(json.dumps(whole)), asdict(RowRule()))


RESERVED_BUILD_KEYS = ("out_dir", "name", "source", "train", "valid", "test", "compare")


@dataclass
class DataConfig(RowRule):
    """Where the examples come from: a file for each split, or `prefix`, or `build`.

    `prefix` stands for PREFIX_train.json, PREFIX_valid.json and PREFIX_test.json, a builder's OUT_DIR/NAME. `build`:
    keys for the task's data builder, which runs once and writes to the cache if no training file is named. `test`
    overrides the test file of `prefix` and `build`. The rule for rows is that of the files that are named.
    """

    task: TaskName | None = None  # decides how answers are judged
    train: PathName = ""
    valid: PathName = ""
    test: PathName = ""
    prefix: PathName = ""
    build: dict[str, Any] = field(default_factory=dict)
    too_long: TooLong = TooLong.error  # for examples longer than the model's context
    unreadable: Unreadable = Unreadable.error  # for examples whose gold answer would be judged wrong
    format: PromptFormat = field(default_factory=PromptFormat)
    cache_dir: PathName | None = None  # for tokens and built data; by default COCONUT_CACHE or ~/.cache/coconut

    def __post_init__(self) -> None:
        named = {split: getattr(self, split) for split in TRAINING_SPLITS if getattr(self, split)}
        self.build = {key: value for key, value in self.build.items() if value is not None}
        if self.prefix and named:
            split, file = next(iter(named.items()))
            raise ValueError(f"data.prefix={self.prefix} and data.{split}={file} are both given. Keep one of them.")
        if (rule := RowRule.from_dict(asdict(self))).rule() and not (named or self.test):
            raise ValueError(
                f"{next(as_arguments(rule, prefix='data.'))} says how the rows of a file are read, but no file is "
                "named. Give data.train=FILE data.valid=FILE, or leave it out."
            )
        if self.prefix or named:
            self.build = {}  # unused, so it must not enter the run's identity
        for key in RESERVED_BUILD_KEYS:
            if key in self.build:
                raise ValueError(
                    f"data.build.{key}={self.build[key]} is not allowed: data.build holds settings for making rows. "
                    "Name files with data.train, data.valid and data.test."
                )
        for key in ("num_train", "num_valid"):
            if self.build.get(key) == 0:
                raise ValueError(f"data.build.{key} is 0, but a run needs such rows. Raise it, or leave it out.")
        if self.build and not self.task:
            raise ValueError(f"data.build={self.build} needs a task. Set data.task to one of {', '.join(BUILT)}.")
        if self.build and self.task not in BUILT:
            raise ValueError(
                f"data.build={self.build} makes data of {', '.join(BUILT)}, but data.task={self.task} only judges. "
                "Name files: data.train=FILE data.valid=FILE, or data.prefix=FOLDER/NAME for a builder's files."
            )
        if (hub := self.build.get("hub")) and Path(hub).exists():
            raise ValueError(
                f"data.build.hub={hub} is a local folder, whose content may change. Convert it once with coconut data "
                f"{self.task} hub={hub}, and name the files with data.prefix=data/{self.task}."
            )

    def required_task(self) -> TaskName:
        """The task, which decides how answers are judged. Raises ValueError if it is not set."""
        if not self.task:
            raise ValueError(
                f"data.task is missing; it decides how answers are judged. Set it to one of {TASK_NAMES}. numbers (the "
                "same as gsm8k) compares numbers, math LaTeX, letters A to E, yes_no yes and no, prontoqa True and "
                "False, prosqa and pointers text."
            )
        return self.task


SPLITS = ("train", "valid", "test")
TRAINING_SPLITS = ("train", "valid")  # that a training needs


@dataclass
class AdamWConfig:
    """AdamW. `warmup_steps` counts updates since the optimizer was created; `max_grad_norm` 0 means no clipping."""

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
        """The learning rate after `updates` updates of this optimizer: linear warm-up, then constant."""
        return self.lr * self._warmed_up(updates)

    def _warmed_up(self, updates: int) -> float:
        return min(1.0, (updates + 1) / max(self.warmup_steps, 1))


@dataclass
class OptimizerConfig(AdamWConfig):
    """AdamW over the stages of a curriculum. `later_stage_lr`: the learning rate from stage 1 on, if it differs."""

    later_stage_lr: float | None = None
    decay: Decay = Decay.none
    reset_every: Reset = Reset.stage

    def __post_init__(self) -> None:
        super().__post_init__()
        self._above_zero("later_stage_lr")

    def learning_rate(self, updates: int, stage: int = 0, done: float = 0.0) -> float:
        """The learning rate in this stage after `updates` updates of this optimizer and a share `done` of the run."""
        lr = self.later_stage_lr if stage and self.later_stage_lr else self.lr
        fallen = (1 + math.cos(math.pi * done)) / 2 if self.decay is Decay.cosine else 1.0
        return lr * self._warmed_up(updates) * fallen


MECHANISMS: tuple[str, ...] = (  # of coconut.acceleration, which says what each one does
    "onednn", "deferred_gradients", "gelu", "attention", "final_layer", "kv_cache",
)  # fmt: skip


class EngineKind(StrEnum):
    local = "local"  # one device per process; DistributedDataParallel if there are several processes
    deepspeed = "deepspeed"  # ZeRO


@dataclass
class EngineConfig:
    """How updates are executed.

    `threads`: CPU threads of a process, 0 for its share of the cores. `acceleration`: auto, off for plain torch and
    transformers, or names of MECHANISMS separated by commas. `activation_checkpointing`: recompute layers in the
    backward pass instead of keeping their activations. `cuda_graphs`: run the passes of a batch as CUDA graphs, with a
    warning where device=auto finds no GPU. `timeout`: seconds after which a process of several that makes no progress
    ends the run. The rest is for DeepSpeed: ZeRO's stage (1 shards the optimizer, 2 the gradients too, 3 the weights
    too), and what stays in the memory of the host.
    """

    kind: EngineKind = EngineKind.local
    device: str = "auto"
    precision: Precision = Precision.float32
    threads: int = 0
    acceleration: str = "auto"
    activation_checkpointing: bool = False
    cuda_graphs: bool = False
    timeout: float = 600
    zero_stage: int = 0
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @property
    def mechanisms(self) -> frozenset[str]:
        """The mechanisms of `coconut.acceleration` that are on. Raises ValueError for one that does not exist."""
        named = self.acceleration.replace(" ", "").split(",")
        names = frozenset({"auto": MECHANISMS, "off": ()}.get(self.acceleration, named))
        if unknown := sorted(names - set(MECHANISMS)):
            raise ValueError(
                f"engine.acceleration={self.acceleration} names {', '.join(map(repr, unknown))}. Set it to auto, off, "
                f"or some of {','.join(MECHANISMS)}."
            )
        return names

    def __post_init__(self) -> None:
        at_least("engine.", self, threads=0, timeout=1)
        _ = self.mechanisms
        if self.kind is EngineKind.local:
            for name in ("zero_stage", "offload_optimizer", "offload_parameters"):
                if value := getattr(self, name):
                    raise ValueError(f"engine.{name}={value} needs DeepSpeed. Add engine=deepspeed.")
        if self.zero_stage not in range(4):
            raise ValueError(f"engine.zero_stage is {self.zero_stage}; it must be 0, 1, 2 or 3.")
        deepspeed = self.kind is EngineKind.deepspeed
        if self.cuda_graphs and (self.device == "mps" or self.device.startswith("cpu")):
            raise ValueError(
                f"engine.cuda_graphs=true needs an NVIDIA GPU, but engine.device is {self.device}. Set "
                "engine.cuda_graphs=false, or engine.device=cuda."
            )
        if self.cuda_graphs and (deepspeed or self.activation_checkpointing):
            what = "engine=local" if deepspeed else "engine.activation_checkpointing=false"
            raise ValueError(
                f"engine.cuda_graphs=true needs {what}: the rest cannot be recorded in a graph. Change one of the two."
            )
        if deepspeed and self.precision is Precision.bfloat16 and self.zero_stage < 1:
            raise ValueError(
                "engine.precision=bfloat16 keeps float32 master weights, which DeepSpeed supports with "
                "engine.zero_stage=1, 2 or 3. Set one of them, or engine=local."
            )
        if self.offload_optimizer and self.zero_stage < 1:
            raise ValueError("engine.offload_optimizer needs a sharded optimizer: set engine.zero_stage=1, 2 or 3.")
        if self.offload_parameters and self.zero_stage < 3:
            raise ValueError(
                f"engine.offload_parameters needs sharded weights, but engine.zero_stage is {self.zero_stage}. "
                "Set engine.zero_stage=3."
            )


def refuse_cuda_graphs(engine: EngineConfig, subject: str) -> None:
    """Raise ValueError for engine.cuda_graphs=true, since `subject` trains in eval mode, which is not recorded."""
    if engine.cuda_graphs:
        raise ValueError(
            f"engine.cuda_graphs=true records passes in train mode only, but {subject} is trained in eval mode, "
            "without dropout. Set engine.cuda_graphs=false."
        )


class Tracker(StrEnum):
    """Where metrics are sent, in addition to metrics.jsonl."""

    none = "none"
    wandb = "wandb"
    tensorboard = "tensorboard"


class TrackingMode(StrEnum):
    online = "online"
    offline = "offline"  # written to the run's folder; `wandb sync` sends them later


@dataclass
class TrackingConfig:
    """The tracker of a run.

    `project`, `entity`, `name`, `group` and `tags` are passed to W&B; `name` is by default that of the run's folder.
    `finish_timeout`: seconds that the end of training waits at most for the tracker.
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
            raise ValueError("tracking.mode=offline needs a tracker. Add tracking=wandb.")
        if not self.project or set(self.project) & set("/\\#?%:"):
            raise ValueError(f"tracking.project is {self.project!r}; W&B takes a name without / \\ # ? % and :.")


@dataclass
class LaunchConfig:
    """The processes that a command starts on this machine.

    `num_processes`: null for one per GPU. `grace`: seconds to write a checkpoint after a stop signal.
    """

    num_processes: int | None = 1
    grace: int = 300

    def __post_init__(self) -> None:
        at_least("launch.", self, num_processes=1, grace=1)


@dataclass
class RunConfig:
    """The keys of every kind of training: folder, data, engine, launch, tracking, validation and checkpoints."""

    name: str = "custom"  # of the experiment; part of the run's default folder
    run: PathName | None = None  # the run's folder; by default runs/NAME-KIND-seedN-HASH
    resume: Resume = Resume.auto
    init: Place | None = None  # a run or checkpoint whose weights to start from
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    max_new_tokens: int | None = None  # by default enough for the longest gold text, and at least the task's number
    micro_batch_size: int | None = None  # examples or answers per forward pass; by default a process's share of a batch
    eval_batch_size: int = 64
    valid_limit: int | None = None  # validate on the first so many examples only
    keep_checkpoints: int = 2  # the newest ones; the best one is always kept
    keep_every: int = 0  # a checkpoint at each multiple of this many steps is written and kept
    save_every: int = 0  # steps between additional checkpoints; 0: one with each validation only

    def __post_init__(self) -> None:
        at_least("", self, seed=0, max_new_tokens=1, eval_batch_size=1, valid_limit=1, keep_checkpoints=1, keep_every=0,
                 save_every=0)  # fmt: skip
        named = [split for split in TRAINING_SPLITS if getattr(self.data, split)]
        for split in TRAINING_SPLITS:
            if split not in named and not self.data.prefix and (named or not self.data.build):
                raise ValueError(
                    f"data.{split} names no file. Set data.{split}=FILE, or choose a data set that is built, such as "
                    "data=graphs, and name no file at all."
                )

    def folder(self) -> Path:
        """The run's folder: `run`, or a default name with a hash of what `identity()` has besides defaults.

        A key that is added later, with a default that changes nothing, leaves the name of the folder as it is.
        """
        differing = _set_keys(self.identity(), _defaults(type(self)))
        digest = hashlib.sha256(json.dumps(differing, sort_keys=True).encode()).hexdigest()
        return Path(self.run or f"runs/{self.name}-{self.kind}-seed{self.seed}-{digest[:8]}")

    @property
    def kind(self) -> str:
        """The part of the default folder's name that tells runs of one experiment apart, such as the method."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """The configuration without the keys in NOT_IDENTITY."""
        return identity(asdict(self), type(self))


@dataclass
class TrainConfig(RunConfig):
    method: str = "coconut"
    curriculum: Curriculum = field(default_factory=Curriculum)
    terms: dict[str, float] = field(default_factory=dict)  # weights of terms of the loss in place of the method's
    term_options: dict[str, dict[str, Any]] = field(default_factory=dict)  # of terms, by name
    model: ModelConfig = field(default_factory=lambda: ModelConfig(base="openai-community/gpt2"))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch_size: int = 128  # examples per update, over all processes
    validate_every: int = 0  # in updates; 0: at the end of each epoch. The end of a stage is always validated
    dry_run: bool = False  # measure seconds and memory of some updates, and train and write nothing

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data.required_task()
        at_least("", self, batch_size=1, micro_batch_size=1, validate_every=0)
        if self.model.lora.rank and not (self.model.base or self.init):
            raise ValueError(
                f"model.lora.rank={self.model.lora.rank} needs a pretrained model, but model.architecture creates a "
                "new one. Set model.base=NAME_OR_FOLDER or init=RUN, or leave LoRA out."
            )
        terms = self.plan().terms
        if self.engine.cuda_graphs and (more := [term.name for term in terms if term.at is not At.targets]):
            raise ValueError(
                f"engine.cuda_graphs=true records the model's layers alone, but the terms {', '.join(more)} of "
                f"{self.method} need more of a pass than its last hidden states. Set engine.cuda_graphs=false."
            )

    def plan(self) -> Plan:
        """The stages and terms of the run. Raises ValueError as coconut.methods.plan does."""
        model = self.model
        slot = {"projector": model.projector, "width": model.projector_width, "update": model.update,
                "iterations": model.iterations, "content": model.content, "top_k": model.top_k,
                "temperature": model.mixture_temperature, "alpha": model.alpha, "layer": model.layer,
                "group": model.group, "max_group": model.max_group, "pooling": model.pooling,
                "scale": model.thought_scale}  # fmt: skip
        return plan(self.method, self.curriculum, self.terms, slot, self.term_options)

    @property
    def kind(self) -> str:
        return self.method


def make_paths_absolute(config: RunConfig) -> None:
    """Make the paths in a configuration absolute, except `run`, so that a run can be resumed from any folder.

    A value that may also be a name on the Hugging Face hub counts as a path if such a folder exists.
    """

    def absolute(key: str, kind: Kind, text: str) -> str:
        is_path = kind.tag == "path" and key != "run"
        is_folder = kind.tag == "place" and text != WORDS and Path(text).exists()
        return str(Path(text).resolve()) if text and (is_path or is_folder) else text

    map_texts(config, absolute)


def identity(config: dict[str, Any], schema: type[RunConfig] = TrainConfig) -> dict[str, Any]:
    """The part of a configuration that says what a run computes: all but NOT_IDENTITY.

    Keys that are missing, since they were added after the run began, get their defaults.
    """
    return _without_excluded_keys(_with_defaults(config, _defaults(schema)))


def _defaults(schema: type[RunConfig]) -> dict[str, Any]:
    """The default of every key that has one; sections as dictionaries."""
    values = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(schema)}
    return {name: asdict(value) if is_dataclass(value) else value for name, value in values.items()}  # pyright: ignore


def _with_defaults(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    both = {**defaults, **config}
    return {
        key: _with_defaults(value, defaults[key]) if _are_sections(value, defaults.get(key)) else value
        for key, value in both.items()
    }


def _set_keys(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The keys that differ from their defaults."""
    return {
        key: _set_keys(value, defaults[key]) if _are_sections(value, defaults.get(key)) else value
        for key, value in config.items()
        if key not in defaults or value != defaults[key]
    }


def _are_sections(value: Any, default: Any) -> bool:
    return isinstance(value, dict) and isinstance(default, dict) and bool(default)


def _without_excluded_keys(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    return {
        key: _without_excluded_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in config.items()
        if f"{prefix}{key}" not in NOT_IDENTITY
    }


@dataclass
class DataFiles(RowRule):
    """Files to use instead of those in a run's configuration, and how to read them if not as the run's are."""

    train: PathName | None = None
    valid: PathName | None = None
    test: PathName | None = None


def needs_run(run: str) -> None:
    if not run:
        raise ValueError("Name the run: run=DIR, a folder written by coconut train.")
