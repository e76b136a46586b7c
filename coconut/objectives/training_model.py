"""A model together with the terms of its training loss.

Shapes: R rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from coconut.data.batching import IGNORED, Batch
from coconut.engine.base import Loss
from coconut.methods import At, Plan, Reasoning
from coconut.models.latent_lm import LatentLM
from coconut.models.passes import LatentOutput, Reads
from coconut.objectives.base import TermObjective
from coconut.utils.files import apply_umask

FOLDER = "training_modules"  # in a checkpoint: the weights that only training needs, a file for each term


class TrainingModel(nn.Module):
    """What an engine trains: `lm`, and the modules that only its terms need."""

    def __init__(self, lm: LatentLM, plan: Plan):
        super().__init__()
        self.lm = lm
        self.terms = plan.terms
        forms = plan.stages[0].together
        names = [form.name for form in forms]
        objectives: list[TermObjective] = [
            import_module(f"coconut.objectives.{term.objective}").Objective(term, forms, lm) for term in plan.terms
        ]
        self.objectives = nn.ModuleDict({term.name: it for term, it in zip(plan.terms, objectives, strict=True)})
        self.token_forms = {names.index(term.of) for term in plan.terms if term.objective == "tokens"}
        forms = [form for stage in plan.stages for form in (*stage.forms_at_inference, *plan.mixing_forms)]
        self.may_not_think = any(not (form.slot.merges or (form.slot.thinks and form.slot_length)) for form in forms)
        lm.feedback.requires_grad_(any(form.slot.thinks for form in forms))
        self.measured = [it for it in objectives if type(it).measure is not TermObjective.measure]

    @property
    def loss(self) -> Loss:
        """What the engine minimises."""
        return Loss(
            sums=lambda module, batch, *given: module(batch, *given),
            weights=tuple(term.weight for term in self.terms),
            statistics=(lambda module, batch: module(batch, measure=True)) if self.measured else None,
            idle=self._idle_parameters,
            may_skip_modules=self.may_not_think and self.lm.feedback.has_weights,
        )

    def _idle_parameters(self, denominators: Sequence[int]) -> Iterable[nn.Parameter]:
        """Those of terms that have nothing to count in an update, as SIM-CoT's decoder before the first thought."""
        for objective, count in zip(self.objectives.values(), denominators, strict=True):
            if not count:
                yield from objective.parameters()

    def forward(self, batch: Batch, statistics: Tensor | None = None, measure: bool = False) -> Tensor:
        """(terms,) the sum of each term; or with `measure` what the terms need to know of the whole update."""
        if measure:
            return torch.cat([it.measure(self._targets_of(batch, it.to_form), batch) for it in self.measured])
        output = self._run(batch)
        given = statistics.chunk(len(self.measured)) if statistics is not None else [None] * len(self.measured)
        by_term = dict(zip(self.measured, given, strict=True))
        return torch.stack([it(self.lm, output, batch, by_term.get(it)) for it in self.objectives.values()])  # pyright: ignore

    def _run(self, batch: Batch) -> LatentOutput:
        places = {term.at for term in self.terms}
        is_trained_R = torch.isin(batch.form_R, torch.tensor(sorted(self.token_forms)).to(batch.form_R))
        return self.lm(
            batch.input_ids,
            batch.attention_mask,
            labels=batch.labels.where(is_trained_R[:, None], IGNORED),
            return_target_logits=True,
            min_passes=batch.passes,
            thoughts=self.lm.merged_thoughts(batch.spans_RGS),
            reads=Reads(
                columns_B=batch.answer_prompt_R if At.answer_prompt in places else None,
                thoughts_BK=batch.thoughts_RK if places & {At.thoughts, At.before_thoughts} else None,
                before_thoughts=At.before_thoughts in places,
                cached_BM=batch.cached_RM if At.cache in places else None,
            ),
        )

    def _targets_of(self, batch: Batch, form: int) -> LatentOutput:
        """The states that are compared, of the rows of one form alone; those of the other rows are zero."""
        rows = batch.form_R == form
        output = self.lm(
            batch.input_ids[rows], batch.attention_mask[rows], labels=torch.full_like(batch.labels[rows], IGNORED),
            return_target_logits=True, reads=Reads(columns_B=batch.answer_prompt_R[rows]),
        )  # fmt: skip
        assert output.states is not None
        states = output.states.new_zeros(len(rows), *output.states.shape[1:])
        states[rows] = output.states
        return LatentOutput(states=states)

    @property
    def reasoning(self) -> Reasoning:
        return self.lm.reasoning

    @reasoning.setter
    def reasoning(self, value: Reasoning) -> None:
        self.lm.reasoning = value

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the model, and what only its training needs into a folder beside it."""
        from safetensors.torch import save_file

        self.lm.save_pretrained(folder)
        for name, objective in self.objectives.items():
            if weights := {key: weight.detach().cpu().clone() for key, weight in objective.named_parameters()}:
                file = Path(folder) / FOLDER / f"{name}.safetensors"
                file.parent.mkdir(exist_ok=True)
                save_file(weights, file)  # copies, since ZeRO makes all weights views of one tensor
                apply_umask(file)

    def load_training_modules(self, folder: Path) -> None:
        """Read what `save_pretrained` wrote beside the model."""
        from safetensors.torch import load_model

        for name, objective in self.objectives.items():
            if any(True for _ in objective.parameters()):
                load_model(objective, str(folder / FOLDER / f"{name}.safetensors"))
