"""LoRA: train a low-rank correction of a pretrained model, and the embeddings of the added tokens.

peft corrects the linear layers in place, so the model stays the transformers model that it was. The rows of
the added tokens are modules of their own beside the frozen tables: no gradient of a whole table is ever
made, and ZeRO 3 gathers what a module's own weights are.

What is saved is the correction, in peft's format, and the rows. Where the model lies that they belong to,
and what it looked like, is in the `Adapter`.
"""

from __future__ import annotations

import hashlib
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from coconut.config import LoraConfig
from coconut.utils.pretrained import load_pretrained

ROWS_FILE = "added_rows.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of names in peft's files
LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Adapter:
    """What a LoRA model is besides its weights: `base` is a name or an absolute folder."""

    base: str
    settings: LoraConfig
    dtype: str
    fingerprint: str

    @classmethod
    def of(cls, base: PreTrainedModel, place: str, settings: LoraConfig) -> Adapter:
        where = str(Path(place).resolve()) if Path(place).is_dir() else place
        return cls(where, settings, str(base.dtype).removeprefix("torch."), fingerprint(base))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Adapter:
        return cls(**{**values, "settings": LoraConfig(**values["settings"])})

    def open_base(self, place: str | None, attention: str | None) -> PreTrainedModel:
        """The model that the adapter was trained on, from `place` if it has moved.

        Raises ValueError if it is not there, or is another one.
        """
        from transformers import AutoModelForCausalLM

        place = place or self.base
        moved = f"If it has moved: ln -s PLACE {place}, or in Python LatentLM.from_pretrained(FOLDER, base=PLACE)."
        try:
            base = load_pretrained(
                AutoModelForCausalLM, place, dtype=getattr(torch, self.dtype), attn_implementation=attention
            )
        except (OSError, ValueError) as error:
            lost = Path(place).is_absolute() and not Path(place).exists()
            first = "there is no such folder" if lost else str(error).strip().splitlines()[0]
            raise ValueError(
                f"The LoRA weights need the model {place}, which cannot be opened: {first}\n{moved}"
            ) from None
        if fingerprint(base) != self.fingerprint:
            raise ValueError(f"The model {place} is not the one that the LoRA weights were trained on. {moved}")
        return base


def fingerprint(base: PreTrainedModel) -> str:
    """SHA-256 of names, shapes and 16 values, in bfloat16, of every weight but the tables of tokens.

    It changes if the model is trained; it does not with its precision, nor with tokens that are added.
    """
    tables = {id(table.weight) for table in _tables(base)}
    digest = hashlib.sha256()
    for name, weight in sorted(base.named_parameters()):
        if id(weight) not in tables:
            values = weight.detach().flatten()[:: -(-weight.numel() // 16)]
            digest.update(f"{name} {tuple(weight.shape)} {values.bfloat16().tolist()}\n".encode())
    return digest.hexdigest()


def attach(base: PreTrainedModel, added: list[int], settings: LoraConfig, place: str) -> None:
    """Freeze the model from `place`; add a correction that is zero yet, and rows for the tokens `added`.

    Raises ValueError if peft is not there, or if one of the targets is no linear layer of the model.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError:
        raise ValueError("LoRA needs peft. Install it: pip install peft") from None

    targets = find_targets(base, settings.targets)
    transposed = any(isinstance(base.get_submodule(name), Conv1D) for name in targets)
    correction = PeftConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha or 2 * settings.rank,  # pyright: ignore[reportArgumentType]
        lora_dropout=settings.dropout,
        target_modules=targets,
        fan_in_fan_out=transposed,
        base_model_name_or_path=place,
    )
    # peft's own entry point: transformers' add_adapter asks for a version of peft that may not be published
    inject_adapter_in_model(correction, base)
    table, head = _tables(base)
    ids = torch.tensor(added, device=table.weight.device)
    dtype = torch.promote_types(table.weight.dtype, torch.float32)  # what is trained is never less precise
    for weight in base.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(dtype)
    embedding = AddedEmbedding(table, nn.Embedding(len(added), table.weight.shape[1]), ids)
    over = AddedHead(head, nn.Linear(table.weight.shape[1], len(added), bias=_biased(head)), ids)
    for module in (embedding, over):
        module.added.to(table.weight.device, dtype)
        module.take()
    if head.weight is table.weight:
        over.added.weight = embedding.added.weight
    base.set_input_embeddings(embedding)
    base.set_output_embeddings(over)


def find_targets(base: PreTrainedModel, asked: list[str]) -> list[str]:
    """The full names of the layers to correct; all linear ones but the head if none is asked for."""
    head = base.get_output_embeddings()
    linear = [name for name, module in base.named_modules() if isinstance(module, LINEAR) and module is not head]
    found: set[str] = set()
    for end in asked:
        if not (matching := {name for name in linear if f".{name}".endswith(f".{end}")}):
            there = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise ValueError(
                f"model.lora.targets names {end}, and this model ({base.config.model_type}) has no such linear layer. "
                f"There are: {', '.join(there)}. Leave model.lora.targets out to correct all of them."
            )
        found |= matching
    return sorted(found) if asked else linear


def save(base: PreTrainedModel, folder: Path | str) -> None:
    """Write what `attach` added: the correction as peft does, and the rows."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    base.peft_config["default"].save_pretrained(str(folder))
    weights = {f"{PREFIX}{name}": weight.contiguous() for name, weight in _correction(base).items()}
    save_file(weights, Path(folder) / ADAPTER_FILE, metadata={"format": "pt"})
    embedding, head = _tables(base)
    sides = {"input": embedding.added, "output": head.added}
    rows = {f"{side}.{name}": w.detach() for side, added in sides.items() for name, w in added.named_parameters()}
    if head.added.weight is embedding.added.weight:
        del rows["output.weight"]
    save_file(rows, Path(folder) / ROWS_FILE)


def load(base: PreTrainedModel, folder: Path | str) -> None:
    """Give what `attach` added the weights that `save` wrote.

    Raises ValueError if they do not fit.
    """
    from peft import set_peft_model_state_dict

    weights = {name.removeprefix(PREFIX): w for name, w in load_file(Path(folder) / ADAPTER_FILE).items()}
    if odd := sorted(_correction(base).keys() ^ weights.keys()):
        raise ValueError(f"The LoRA weights in {folder} do not fit the model: {', '.join(odd[:4])}.")
    set_peft_model_state_dict(base, weights)
    embedding, head = _tables(base)
    rows = load_file(Path(folder) / ROWS_FILE)
    with torch.no_grad():
        for name, values in rows.items():
            side, own = name.split(".")
            (embedding if side == "input" else head).added.get_parameter(own).copy_(values)


def _correction(base: PreTrainedModel) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(base, save_embedding_layers=False)


def merged(base: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model with what was trained written into its own weights, as plain as it was before."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model: Any = deepcopy(base)
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()  # pyright: ignore[reportCallIssue]
            model.set_submodule(name, module.get_base_layer())
    embedding, head = _tables(model)
    for module in (embedding, head):
        module.give()
    model.set_input_embeddings(embedding.whole)
    model.set_output_embeddings(head.whole)
    del model.peft_config
    return model.requires_grad_(True)


class _Added(nn.Module):
    """A frozen table of tokens, `whole`, and a small one of those tokens that are trained, `added`."""

    ids: Tensor

    def __init__(self, whole: nn.Module, added: nn.Module, ids: Tensor):
        super().__init__()
        self.whole, self.added = whole, added
        self.register_buffer("ids", ids, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The table as it is used; it cannot be written to."""
        whole, added = self.whole.get_parameter("weight"), self.added.get_parameter("weight")
        return whole.index_copy(0, self.ids, added.to(whole.dtype))

    @torch.no_grad()
    def take(self) -> None:
        """Start from the rows of the table."""
        for name, weight in self.added.named_parameters():
            weight.copy_(self.whole.get_parameter(name)[self.ids])

    @torch.no_grad()
    def give(self) -> None:
        """Write the rows into the table."""
        for name, weight in self.added.named_parameters():
            whole = self.whole.get_parameter(name)
            whole[self.ids] = weight.to(whole.dtype)


class AddedEmbedding(_Added):
    @property
    def num_embeddings(self) -> int:
        return self.whole.num_embeddings  # pyright: ignore

    @property
    def embedding_dim(self) -> int:
        return self.whole.embedding_dim  # pyright: ignore

    def forward(self, input_ids: Tensor) -> Tensor:
        """(..., D) embeddings of ids, scaled where the model scales them (Gemma)."""
        embeds = self.whole(input_ids)
        match = input_ids[..., None] == self.ids
        rows = self.added(match.long().argmax(-1)).to(embeds.dtype)
        if (scale := getattr(self.whole, "embed_scale", None)) is not None:
            rows = rows * torch.as_tensor(scale).to(rows)
        return torch.where(match.any(-1, keepdim=True), rows, embeds)


class AddedHead(_Added):
    def forward(self, states: Tensor) -> Tensor:
        """(..., D) states to (..., V) logits."""
        logits = self.whole(states)
        rows = self.added(states.to(self.added.weight.dtype))  # pyright: ignore
        logits[..., self.ids] = rows.to(logits.dtype)
        return logits


def _tables(base: PreTrainedModel) -> tuple[Any, Any]:
    return base.get_input_embeddings(), base.get_output_embeddings()


def _biased(head: Any) -> bool:
    return getattr(head, "bias", None) is not None
