"""LatentLM: a Hugging Face causal language model that can feed its last hidden state back as input.

Wherever `input_ids` holds the latent token, the input embedding is replaced by a thought: what `thought` makes of the
last hidden state, after the final norm, of the token before it. In Coconut that is the state itself (Hao et al., arXiv
2412.06769, section 3). Gradients flow through the thoughts.

Two implementations give the same results. Read `_recomputed` first: it runs the whole rows again for every thought.
`_cached`, the default, cuts the rows at their thoughts and runs each position once, in thoughts + 1 passes over a KV
cache.

Shapes: B rows, T columns as given, S columns as the passes take them, D hidden, V vocabulary, N targets; E numbers that
a thought is made of (`source_states`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import copy, deepcopy
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coconut.acceleration.facade import Acceleration
from coconut.data.batching import IGNORED
from coconut.data.tokenization import SpecialIds, add_control_tokens, add_rate_tokens, add_special_tokens
from coconut.methods import GatedWords, Reasoning, Slot, Update, parse_mode
from coconut.models import families, lora
from coconut.models.feedback import Feedback, merge, mixture
from coconut.models.gates import Gates
from coconut.models.losses import summed_cross_entropy, target_log_probs
from coconut.models.masks import SlidingWindow, after_last_token, unmask_padding
from coconut.models.passes import (
    CollectedReads,
    LatentInputs,
    LatentOutput,
    PassesOutput,
    Reads,
    Targets,
    gather_columns,
    plan_blocks,
    plan_passes,
    previous_token,
    read_cache,
)
from coconut.models.serialization import SavedParts, load_parts, save_parts
from coconut.models.token_embeddings import check_tables, grow_tables

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from coconut.config import LoraConfig
    from coconut.generation.generate import Generated


class LatentLM(nn.Module):
    """A causal language model (`base`), its tokenizer, and how it reasons."""

    def __init__(
        self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, special: SpecialIds,
        reasoning: Reasoning | None = None, new_tokens: dict[str, Any] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.base = base
        self.tokenizer = tokenizer
        self.special = special
        self.reasoning = reasoning or Reasoning()
        self.feedback = self.new_feedback(self.reasoning.slot)
        self.gates: Gates | None = None
        self.new_tokens = new_tokens or {}
        self.adapter: lora.Adapter | None = None
        self.acceleration = Acceleration(base, families.is_tested(base))
        self.cache_argument = families.cache_argument(base)
        self._windows = SlidingWindow.of(base)

    # --- construction, saving, loading --------------------------------------------------------------

    @classmethod
    def from_base(
        cls, base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, init: str = "mean",
        reasoning: Reasoning | None = None,
    ) -> LatentLM:  # fmt: skip
        """Wrap a causal language model; add `<bot>`, `<eot>`, `<latent>`, `<pause>` where they are missing.

        `base` is kept, and its embedding tables grow. `init`: what the embeddings of new tokens start from: "mean" of
        the table, "random" (normal with the table's standard deviation), or a token of the tokenizer.

        Raises ValueError if the model's family cannot be fed its own hidden states (docs/models.md), if the tokenizer
        has no end-of-sequence token or more entries than the model, or if `init` is no token of it.
        """
        families.check_base(base)
        check_tables(base, tokenizer, init)
        if not families.is_tested(base):
            families.check_feedback(cls(base, tokenizer, families.TRIAL_TOKENS), base, len(tokenizer))
        known = len(tokenizer)
        special = add_special_tokens(tokenizer)
        added = grow_tables(base, tokenizer, known, init)
        return cls(base, tokenizer, special, reasoning, {"init": init, "tokens": added})

    def add_modes(self, modes: Sequence[str], init: str = "mean") -> None:
        """Make it a hybrid model, whose first token chooses one of these modes (coconut.methods.parse_mode).

        Missing control tokens are added, with embeddings that start from `init`. Raises ValueError for an unknown mode,
        if tokens are missing and the model has LoRA, whose added tokens are fixed, or if a mode has thoughts and the
        model's are predicted by a head.
        """
        if self.feedback.slot.merges and any(parse_mode(name).slot.thinks for name in modes):
            raise ValueError(
                f"Modes with thoughts feed hidden states back, and {self.reasoning.method} predicts its thoughts by a "
                "head. Start from another model, or leave these modes out."
            )
        missing = [parse_mode(name).token for name in modes if name not in self.special.control]
        if missing and self.adapter:
            raise ValueError(f"This model has LoRA, and no rows for {', '.join(missing)}. Merge it first: lm.merged().")
        known = len(self.tokenizer)
        self.special = add_control_tokens(self.tokenizer, self.special, modes)
        added = grow_tables(self.base, self.tokenizer, known, init)
        self.reasoning = replace(self.reasoning, modes=tuple(modes))
        if added:
            self.new_tokens = {**self.new_tokens, "control": {"init": init, "tokens": added}}

    def add_rates(self, max_group: int, init: str = "mean") -> None:
        """Add the tokens `<rate_1>` to `<rate_N>`, N = `max_group`, where they are missing.

        Their embeddings start from `init`. Raises ValueError if the model has LoRA, whose added tokens are fixed.
        """
        if max_group <= len(self.special.rates):
            return
        if self.adapter:
            raise ValueError("This model has LoRA, and no rows for tokens of rates. Merge it first: lm.merged().")
        known = len(self.tokenizer)
        self.special = add_rate_tokens(self.tokenizer, self.special, max_group)
        added = grow_tables(self.base, self.tokenizer, known, init)
        self.new_tokens = {**self.new_tokens, "rates": {"init": init, "tokens": added}}

    def new_feedback(self, slot: Slot) -> Feedback:
        """What maps states to thoughts in this slot, with new weights."""
        table: Any = self.base.get_input_embeddings()
        return Feedback(slot, self.thought_size, table.weight).to(self.device)

    def add_lora(self, settings: LoraConfig, place: str) -> None:
        """Freeze the model; train a LoRA correction and the embeddings of the added tokens. Only these are saved.

        `place`: the name or folder that `base` was and will be loaded from. Raises ValueError if peft is missing, if a
        target is no linear layer of the model, or if the model has LoRA already.
        """
        if self.adapter:
            raise ValueError("This model has LoRA already. Write it whole first: lm.merged().save_pretrained(FOLDER).")
        adapter = lora.Adapter.of(self.base, place, settings)
        lora.attach(self.base, self.special.added, settings, adapter.base)
        self.adapter = adapter

    def add_gates(self, low: float = 0.99, high: float = 0.999, temperature: float = 1.0) -> None:
        """Feed the words before the answer mark with what was expected in their place (`coconut.models.gates`).

        `low`, `high`: where the gates start, from torch's generator. `temperature`: of the distribution whose expected
        embedding is mixed in. Raises ValueError if the model has gates already, if it has a slot or modes, or if its
        prompt format has no answer mark, at which its reasoning would end.
        """
        if self.gates:
            raise ValueError("This model has gates already. Train them further, or start from a model without them.")
        slot, modes = self.reasoning.slot, self.reasoning.modes
        if modes or not slot.is_empty:
            what = f"chooses among the modes {', '.join(modes)}" if modes else f"has a slot that holds {slot.noun}s"
            raise ValueError(
                f"Gates mix what a model expects into the words of its chain, and this one {what}. Start from a model "
                "that writes its chain, such as one of coconut train method=cot."
            )
        if not self.reasoning.format.answer_mark:
            raise ValueError(
                f"Gates are used until the answer begins, and the format of the answer, "
                f"{self.reasoning.format.answer!r}, has no text before {{}} to know it by. Start from a model that was "
                'trained with one, such as data.format.answer="### {}".'
            )
        self.gates = Gates(self.thought_size, low, high).to(self.device)
        self.reasoning = replace(self.reasoning, gated=GatedWords(temperature))

    def with_reasoning(self, reasoning: Reasoning) -> LatentLM:
        """The same model, whose weights it shares, with other settings for inference."""
        other = copy(self)
        other.reasoning = reasoning
        return other

    def merged(self) -> LatentLM:
        """A copy without LoRA that computes the same: the correction is added to the weights."""
        if not self.adapter:
            raise ValueError("This model has no LoRA to merge; it is whole already.")
        whole = LatentLM(lora.merged(self.base), self.tokenizer, self.special, self.reasoning, self.new_tokens)
        whole.feedback, whole.gates = deepcopy(self.feedback), deepcopy(self.gates)
        return whole

    def save_pretrained(self, folder: Path | str, max_shard_size: str = "5GB") -> None:
        """Write weights, tokenizer and reasoning. AutoModelForCausalLM and AutoTokenizer open the folder too.

        Of a LoRA model only what is trained is written; `merged` gives a model that is written whole.
        """
        parts = SavedParts(
            self.base, self.tokenizer, self.special, self.reasoning, self.new_tokens, self.feedback, self.adapter,
            self.gates,
        )  # fmt: skip
        save_parts(parts, folder, max_shard_size)

    @classmethod
    def from_pretrained(cls, folder: Path | str, attention: str | None = None, base: str | None = None) -> LatentLM:
        """Load what `save_pretrained` wrote: a folder, or OWNER/NAME on the hub.

        `attention`: transformers' attn_implementation, which is not saved with a model. `base`: where the model that
        LoRA corrects lies, if it has moved. Raises FileNotFoundError or ValueError if the folder is no such model.
        """
        parts = load_parts(folder, attention, base)
        lm = cls(parts.base, parts.tokenizer, parts.special, parts.reasoning, parts.new_tokens)
        lm.feedback, lm.adapter, lm.gates = parts.feedback, parts.adapter, parts.gates
        return lm

    def push_to_hub(self, name: str, private: bool = True) -> None:
        """Put it on the Hugging Face hub as OWNER/NAME, with a card. Raises ValueError if the hub refuses it."""
        from coconut.hub.push import push_model

        push_model(self, name, private)

    @property
    def latent_id(self) -> int:
        return self.special.latent

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def thought_size(self) -> int:
        """The width of a thought, which is that of a word's embedding."""
        return families.thought_size(self.base)

    @property
    def max_sequence_length(self) -> int:
        return families.max_sequence_length(families.text_config(self.base))

    # --- training and scoring -----------------------------------------------------------------------

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        labels: Tensor | None = None, *, return_logits: bool = False, return_target_logits: bool = False,
        use_cache: bool = True, min_passes: int = 1, reads: Reads | None = None, thought_offsets: Tensor | None = None,
        thoughts: Tensor | None = None, expected: Tensor | None = None,
    ) -> LatentOutput:  # fmt: skip
        """Run a batch; a thought stands wherever `input_ids` is the latent token.

        All arguments are (B, T). Padding may stand on either side, and rows may differ in the number and the places of
        their thoughts. `position_ids` come from the mask by default. `labels` follow transformers' convention: the
        label of a column is its own token, or -100 where there is no target. A label on the first token of a row is not
        counted: no hidden state precedes it. `use_cache=False` takes the recomputing path. The batch takes at least
        `min_passes` passes: processes that share a model must run equally many. `reads`: what else is wanted.
        `thought_offsets` (B, K, D): added to the thoughts of each row as they are fed; where thoughts are updated all
        at once, to what the last iteration has made of them. The gradient of the loss with respect to zeros here is
        that with respect to the thoughts. Thoughts that are never updated are pauses, and nothing is added to them.
        `thoughts` (B, K, D): fed in place of the model's own, a row's first one at its first thought. All are known, so
        that everything takes one pass, or `min_passes`.
        `expected` (B, T, D): the expected embeddings that the model's gates mix into the words of these columns; where
        it is zero a word is fed as it is.

        Raises ValueError if a row begins with a thought, for `thoughts` of a wrong shape or of a model whose thoughts
        cannot be given (`Slot.cannot_be_given`), or if transformers' gradient checkpointing is on together with the
        cache (transformers would drop the cache, and thoughts would lose their context).
        """
        reads = reads or Reads()
        if (thoughts is not None or reads.own_thoughts) and (why := self.feedback.slot.cannot_be_given):
            raise ValueError(f"thoughts are not for {self.reasoning.method}: {why}. Leave them out.")
        inputs = LatentInputs.of(
            input_ids, attention_mask, position_ids, self.latent_id, thought_offsets, thoughts, expected
        )
        targets = None if labels is None else Targets.of(labels, inputs.is_token_BT)
        is_read_BT = targets.is_source_BT if targets and not return_logits else inputs.is_token_BT
        is_read_BT = reads.mark(is_read_BT, inputs.is_token_BT)
        own = None
        if reads.own_thoughts:
            own = Targets.of(torch.where(inputs.is_latent_BT, inputs.ids_BT, IGNORED), inputs.is_token_BT)
            is_read_BT = is_read_BT | own.is_source_BT
        run = partial(self._cached, is_read_BT, min_passes) if use_cache else self._recomputed
        passed = run(inputs, reads)
        hidden_BSD, columns_BT = passed.hidden_BSD, passed.columns_BT
        output = LatentOutput(states=passed.states_BLD, thoughts=passed.thoughts_BKD)
        if passed.keys_values:
            output.keys, output.values = passed.keys_values
        if reads.before_thoughts:
            before_BK = reads.columns_before(inputs.is_token_BT)
            in_passes_BK = torch.where(before_BK < 0, -1, columns_BT.gather(1, before_BK.clamp(min=0)))
            output.before_thoughts = torch.stack([*passed.iterations, gather_columns(hidden_BSD, in_passes_BK)])
        if own:
            own_MD = self.thought(hidden_BSD[own.rows_N, columns_BT[own.rows_N, own.sources_N]])
            count_B1 = inputs.is_latent_BT.sum(1, keepdim=True)
            K = int(count_B1.max()) if thoughts is None else thoughts.shape[1]
            is_thought_BK = torch.arange(K, device=hidden_BSD.device) < count_B1
            own_BKD = own_MD.new_zeros(*is_thought_BK.shape, own_MD.shape[1])
            output.own_thoughts = own_BKD.masked_scatter(is_thought_BK[..., None], own_MD)
        if targets:
            hidden_ND = hidden_BSD[targets.rows_N, columns_BT[targets.rows_N, targets.sources_N]]
            output.num_targets = len(targets.ids_N)
            if return_target_logits:
                output.target_logits, output.targets = self.logits(hidden_ND), targets.ids_N
                output.target_rows = targets.rows_N
            else:
                output.loss_sum = summed_cross_entropy(self.logits(hidden_ND), targets.ids_N)
        if return_logits:
            output.logits = self.logits(gather_columns(hidden_BSD, columns_BT))
        return output

    def log_probs(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        labels: Tensor | None = None, *, use_cache: bool = True,
    ) -> Tensor:  # fmt: skip
        """(N,) log-probability of each target in float32, row by row, in the order of the tokens."""
        if labels is None:
            raise ValueError("log_probs needs labels: they say which tokens to score (-100 elsewhere).")
        output = self(input_ids, attention_mask, position_ids, labels, return_target_logits=True, use_cache=use_cache)
        return target_log_probs(output.target_logits, output.targets)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int | None = None, **options: Any
    ) -> Generated:
        """Think, then decode an answer: `coconut.generation.generate.generate` with this model."""
        from coconut.generation.generate import generate

        return generate(self, input_ids, attention_mask, max_new_tokens=max_new_tokens, **options)

    def _embeds(self, ids_BT: Tensor, expected_BTD: Tensor | None) -> Tensor:
        """(B, T, D) the embeddings of tokens, with what was expected mixed into them where it is not zero."""
        embeds_BTD = self.base.get_input_embeddings()(ids_BT)
        if expected_BTD is None:
            return embeds_BTD
        assert self.gates, "expected embeddings are for a model with gates"
        is_gated_BT1 = expected_BTD.any(-1, keepdim=True)
        return torch.where(is_gated_BT1, self.gates(embeds_BTD, expected_BTD), embeds_BTD)

    # --- the feedback loop, in two implementations --------------------------------------------------

    def _recomputed(self, inputs: LatentInputs, reads: Reads) -> PassesOutput:
        """For each thought in turn, or each iteration over all: run everything, and feed hidden states back.

        Given thoughts are fed at once.
        """
        tokens_BTD = self._embeds(inputs.ids_BT, inputs.expected_BTD)
        tokens_BTD = embeds_BTD = inputs.with_given(tokens_BTD, inputs.is_latent_BT)
        previous_BT = previous_token(inputs.is_token_BT).clamp(min=0)
        number_BT = inputs.is_latent_BT.long().cumsum(1) * inputs.is_latent_BT  # 1 at a row's first thought, and so on
        mask: Any = inputs.is_token_BT
        if self._windows and self._windows.needs_masks(mask):
            mask = self._windows.masks(mask, inputs.positions_BT, 0, embeds_BTD.dtype)
        iterations: list[Tensor] = []
        offsets_BTD = inputs.offsets_at(inputs.is_latent_BT)
        slot, counts_B1 = self.feedback.slot, number_BT.amax(1, keepdim=True)
        updates_B1 = slot.count_iterations(counts_B1) if slot.in_parallel else counts_B1
        if inputs.given_BKD is not None:
            updates_B1 = torch.zeros_like(counts_B1)
        for number in range(1, 1 + int(updates_B1.max())):
            states_BTE = self.source_states(embeds_BTD, mask, inputs.positions_BT)
            before_BTE = states_BTE.gather(1, previous_BT[..., None].expand_as(states_BTE))
            if reads.before_thoughts and slot.in_parallel:
                last_BTD = self.last_states(states_BTE)
                iterations.append(gather_columns(last_BTD, reads.columns_before(inputs.is_token_BT)))
            thoughts_BTD = self._updated(tokens_BTD, states_BTE, before_BTE)
            if offsets_BTD is not None and not slot.in_parallel:
                thoughts_BTD = thoughts_BTD + offsets_BTD.to(thoughts_BTD)
            is_next_BT = number_BT == number
            is_updated_BT = inputs.is_latent_BT & (number <= updates_B1) if slot.in_parallel else is_next_BT
            embeds_BTD = torch.where(is_updated_BT[..., None], thoughts_BTD, embeds_BTD)
        if offsets_BTD is not None and slot.in_parallel and slot.iterations:
            embeds_BTD = embeds_BTD + offsets_BTD.to(embeds_BTD)
        cache = None if reads.cached_BM is None else self.new_cache(embeds_BTD.shape[1], windows=False)
        layers = self._layers(embeds_BTD, mask, inputs.positions_BT, cache, every=reads.columns_B is not None)
        columns_BT = torch.arange(embeds_BTD.shape[1], device=embeds_BTD.device).expand_as(previous_BT)
        states = thoughts = None
        if reads.columns_B is not None:
            states = torch.stack([gather_columns(layer, reads.columns_B[:, None])[:, 0] for layer in layers], dim=1)
        if reads.thoughts_BK is not None:
            thoughts = gather_columns(embeds_BTD, reads.thoughts_BK)
        keys_values = None if reads.cached_BM is None else read_cache(cache, reads.cached_BM)
        return PassesOutput(layers[-1], columns_BT, states, thoughts, tuple(iterations), keys_values)

    def _cached(self, is_read_BT: Tensor, min_passes: int, inputs: LatentInputs, reads: Reads) -> PassesOutput:
        """Cut the rows at their thoughts, and run each position once."""
        is_given_BT = inputs.is_latent_BT
        if inputs.given_BKD is not None:
            inputs = replace(inputs, is_latent_BT=torch.zeros_like(inputs.is_latent_BT))  # nothing to wait for
        elif self.feedback.slot.in_parallel:
            if self.feedback.slot.iterations and (min_passes > 1 or inputs.is_latent_BT.any()):
                return self._cached_block(is_read_BT, min_passes, inputs, reads)
            inputs = replace(inputs, is_latent_BT=torch.zeros_like(inputs.is_latent_BT))  # they stay pauses
        replay = self.acceleration.can_replay() and inputs.offsets_BKD is None and bool(inputs.is_latent_BT.any())
        plan = plan_passes(inputs.is_latent_BT, inputs.is_token_BT, min_passes, bucket_widths=replay, reads=reads)
        num_skipped = plan.count_skipped(is_read_BT)
        is_latent_BS = plan.gather(inputs.is_latent_BT) & plan.is_token_BS
        expected_BTD = inputs.expected_BTD
        expected_BSD = None if expected_BTD is None else gather_columns(expected_BTD, plan.source_BS)
        embeds_BSD = self._embeds(plan.gather(inputs.ids_BT), expected_BSD)
        embeds_BSD = inputs.with_given(embeds_BSD, plan.gather(is_given_BT) & plan.is_token_BS)
        tensors = embeds_BSD, plan.is_token_BS, is_latent_BS, plan.gather(inputs.positions_BT)
        run = partial(
            self._run_passes, bounds=plan.pass_bounds, num_skipped=num_skipped, reads=plan.in_passes(reads),
            offsets_BSD=inputs.offsets_at(is_latent_BS),
        )  # fmt: skip
        if replay:
            shape = *plan.pass_bounds, *num_skipped
            hidden_BSD = self.acceleration.replay(lambda *args: run(*args).hidden_BSD, tensors, shape)
            return PassesOutput(hidden_BSD, plan.column_BT)
        return replace(run(*tensors), columns_BT=plan.column_BT)

    def _run_passes(
        self, embeds_BSD: Tensor, is_token_BS: Tensor, is_latent_BS: Tensor, positions_BS: Tensor, bounds: list[int],
        num_skipped: list[int], reads: Reads, offsets_BSD: Tensor | None = None,
    ) -> PassesOutput:  # fmt: skip
        """Each pass begins with the thought that the last state of the one before gives.

        The states of the first `num_skipped[k]` columns of pass k are not computed.
        """
        several = len(bounds) > 2
        if several:
            self.acceleration.refuse_checkpointing_by_transformers()
        run, cache = self._prepared(is_token_BS, positions_BS, cached=several or reads.cached_BM is not None)
        collected, last_BE = CollectedReads(reads), None
        with self.acceleration.all_passes() if several else nullcontext():
            for (start, stop), skipped in zip(pairwise(bounds), num_skipped, strict=True):
                block_BTD = embeds_BSD[:, start:stop]
                if last_BE is not None:
                    thought_B1D = self.thought(last_BE)[:, None].to(block_BTD)
                    block_BTD = torch.where(is_latent_BS[:, start:stop, None], thought_B1D, block_BTD)
                    if offsets_BSD is not None:
                        block_BTD = block_BTD + offsets_BSD[:, start:stop].to(block_BTD)
                is_last = stop == bounds[-1]
                reads_layer = self.feedback.slot.reads_layer and not is_last
                every = reads_layer or collected.needs_layers(start, stop, is_last)
                layers = run(block_BTD, start, cache, skipped, every)
                collected.add(block_BTD, layers, start)
                if not is_last:
                    ends_here_B1 = is_token_BS[:, stop - 1, None]
                    end_BE = self._sources(layers)[:, -1]
                    last_BE = end_BE if last_BE is None else torch.where(ends_here_B1, end_BE, last_BE)
        return collected.output(cache)

    def _cached_block(self, is_read_BT: Tensor, min_passes: int, inputs: LatentInputs, reads: Reads) -> PassesOutput:
        """Cut the rows before and after their thoughts. What precedes them runs once, and they in each iteration.

        Rows without thoughts have no part in the iterations. P: rows with thoughts.
        """
        plan = plan_blocks(inputs.is_latent_BT, inputs.is_token_BT, reads)
        start, stop = plan.pass_bounds[1:3]
        is_token_BS, positions_BS = plan.is_token_BS, plan.gather(inputs.positions_BT)
        is_latent_BK = plan.gather(inputs.is_latent_BT)[:, start:stop] & is_token_BS[:, start:stop]
        thinks_B = is_latent_BK.any(1)
        rows_P = thinks_B.nonzero()[:, 0] if thinks_B.any() else torch.arange(len(thinks_B), device=thinks_B.device)
        tokens_BSD = self.base.get_input_embeddings()(plan.gather(inputs.ids_BT))
        self.acceleration.refuse_checkpointing_by_transformers()
        run, cache = self._prepared(is_token_BS, positions_BS, cached=True)
        collected = CollectedReads(plan.in_passes(reads))
        with self.acceleration.all_passes():
            reads_layer = self.feedback.slot.reads_layer
            before = run(tokens_BSD[:, :start], 0, cache, plan.count_skipped(is_read_BT)[0], reads_layer)
            collected.add(tokens_BSD[:, :start], before, 0)
            behind = copy(cache)
            if len(rows_P) < len(thinks_B):
                behind.batch_select_indices(rows_P)
            block_PKD, before_thoughts = self.iterate_block(
                tokens_BSD[rows_P, start:stop], self._sources(before)[rows_P, -1], is_latent_BK[rows_P],
                lambda embeds: self._sources(run(embeds, start, copy(behind), every=reads_layer, rows=rows_P)),
                min_passes - 2,
            )  # fmt: skip
            block_BKD = tokens_BSD[:, start:stop].index_copy(0, rows_P, block_PKD)
            if (offsets_BKD := inputs.offsets_at(is_latent_BK)) is not None:
                block_BKD = block_BKD + offsets_BKD.to(block_BKD)
            rest_BTD = torch.cat([block_BKD, tokens_BSD[:, stop:]], dim=1)
            collected.add(rest_BTD, run(rest_BTD, start, cache, every=reads.columns_B is not None), start)
        iterations = ()
        if reads.before_thoughts and (in_block_BK := collected.reads.thoughts_BK) is not None:
            in_block_PK = torch.where(in_block_BK < 0, -1, in_block_BK - start)[rows_P]
            nothing_BKD = block_BKD.new_zeros(*in_block_BK.shape, block_BKD.shape[2])
            iterations = tuple(
                nothing_BKD.index_copy(0, rows_P, gather_columns(states_PKD, in_block_PK).to(nothing_BKD))
                for states_PKD in before_thoughts
            )
        return replace(collected.output(cache), columns_BT=plan.column_BT, iterations=iterations)

    def _prepared(
        self, is_token_BS: Tensor, positions_BS: Tensor, cached: bool
    ) -> tuple[Callable[..., tuple[Tensor, ...]], Any]:
        """A function that runs columns from `start` of some rows, as `_layers` does; an empty cache for all columns."""
        windows = self._windows if self._windows and self._windows.needs_masks(is_token_BS) else None
        attended_BS = is_token_BS | after_last_token(is_token_BS)

        def run(
            embeds_BTD: Tensor, start: int, cache: Any, num_skipped: int = 0, every: bool = False,
            rows: Tensor | slice = slice(None),
        ) -> tuple[Tensor, ...]:  # fmt: skip
            stop = start + embeds_BTD.shape[1]
            mask, positions = attended_BS[rows, :stop], positions_BS[rows, :stop]
            if windows:
                mask = windows.masks(mask, positions, start, embeds_BTD.dtype)
            return self._layers(embeds_BTD, mask, positions[:, start:], cache, num_skipped, every)

        return run, self.new_cache(is_token_BS.shape[1], windows=windows is None) if cached else None

    def iterate_block(
        self, tokens_BKD: Tensor, last_BE: Tensor, is_latent_BK: Tensor, run: Callable[[Tensor], Tensor],
        least: int = 0,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """(B, K, D) the inputs of a block of thoughts after all iterations; of each, the states before the thoughts.

        `tokens_BKD`: the embeddings of its tokens, with padding before a row's first thought. `last_BE`: the source
        states before the block. `run` computes those of the block from its inputs, behind what precedes it, and is
        called at least `least` times.
        """
        is_first_BK = is_latent_BK & (is_latent_BK.long().cumsum(1) == 1)
        iterations_B11 = self.feedback.slot.count_iterations(is_latent_BK.sum(1))[:, None, None]
        block_BKD, before = tokens_BKD, []
        for done in range(max(int(iterations_B11.max()), least)):
            states_BKE = run(block_BKD)
            before_BKE = torch.where(is_first_BK[..., None], last_BE[:, None], states_BKE.roll(1, dims=1))
            before.append(self.last_states(before_BKE))
            updated_BKD = self._updated(tokens_BKD, states_BKE, before_BKE)
            block_BKD = torch.where(done < iterations_B11, updated_BKD, block_BKD)
        return block_BKD, before

    # --- what a thought is made of ------------------------------------------------------------------

    def thought(self, source_states: Tensor) -> Tensor:
        """(..., D) what is fed after positions with these states (..., E), from `source_states`.

        The content of the slot (`coconut.methods.Content`), then the projector. Gradients flow through both.
        """
        slot = self.feedback.slot
        of_state, of_mixture = slot.weights
        if not of_mixture:
            return self.feedback(source_states[..., : self.thought_size], self)
        logits = self.logits(self.last_states(source_states))
        table = self.base.get_input_embeddings()
        mixture_D = mixture(logits, table, self.special.added, slot.top_k, slot.temperature)
        if not of_state:
            return self.feedback(mixture_D)
        return self.feedback(of_state * source_states[..., : self.thought_size] + of_mixture * mixture_D)

    def ending_thoughts(self, states_BD: Tensor) -> tuple[Tensor, Tensor]:
        """The next thoughts (B, D) of a model that ends them itself, and which rows have ended before them (B,)."""
        return self.thought(states_BD), self.feedback.ends(states_BD, self)

    def source_states(
        self, embeds: Tensor, mask: Any, position_ids: Tensor, cache: Any = None, *, num_skipped: int = 0
    ) -> Tensor:
        """(B, T, E) what thoughts are made of: `hidden_states`, and before them those of another layer if it is read.

        E is D, or 2 D with a fused slot that names a layer. Raises ValueError if the model has no such layer.
        """
        if not self.feedback.slot.reads_layer:
            return self.hidden_states(embeds, mask, position_ids, cache, num_skipped=num_skipped)
        return self._sources(self._layers(embeds, mask, position_ids, cache, num_skipped, every=True))

    def last_states(self, source_states: Tensor) -> Tensor:
        """(..., D) the last hidden states among what thoughts are made of."""
        return source_states[..., -self.thought_size :]

    def _sources(self, layers: tuple[Tensor, ...]) -> Tensor:
        slot = self.feedback.slot
        if not slot.reads_layer:
            return layers[-1]
        if slot.layer >= len(layers) or layers[slot.layer].shape != layers[-1].shape:
            raise ValueError(
                f"model.layer={slot.layer} names a layer whose state is added to words' embeddings of "
                f"{self.thought_size} numbers. This model has the layers 0 to {len(layers) - 1}, of the widths "
                f"{', '.join(str(width) for width in dict.fromkeys(layer.shape[-1] for layer in layers))}."
            )
        return torch.cat([layers[slot.layer], layers[-1]], dim=-1)

    def _updated(self, tokens_BKD: Tensor, states_BKE: Tensor, before_BKE: Tensor) -> Tensor:
        """(B, K, D) the inputs of thoughts in the next iteration, from the states at their positions and before them.

        `tokens_BKD`: the embeddings of their tokens. Jacobi: PCCoT, Wu et al., arXiv 2506.18582, section 3. Loop:
        LOTUS, arXiv 2606.31779.
        """
        if self.feedback.slot.update is Update.loop:
            return tokens_BKD + self.thought(states_BKE).to(tokens_BKD)
        return self.thought(before_BKE).to(tokens_BKD)

    # --- passes -------------------------------------------------------------------------------------

    def hidden_states(
        self, embeds: Tensor, mask: Any, position_ids: Tensor, cache: Any = None, *, num_skipped: int = 0
    ) -> Tensor:
        """Run the model without its head: the last hidden states (B, T, D), after the final norm.

        `embeds` (B, T, D) are input embeddings. `mask` covers them and what the cache holds: (B, S), or in a form that
        the base takes as it is. The cache, from `new_cache`, is extended by them. The first `num_skipped` columns
        (fewer than T) only fill the cache; what is returned for them is meaningless.
        """
        return self._layers(embeds, mask, position_ids, cache, num_skipped)[-1]

    def layer_states(self, embeds: Tensor, is_token: Tensor) -> tuple[Tensor, ...]:
        """Run whole rows without the head or a cache: the input of the first layer and the output of each (B, T, D).

        The last output is after the final norm. `embeds` (B, T, D) are input embeddings, thoughts among them.
        `is_token` (B, T) is False for padding.
        """
        positions_BT = is_token.long().cumsum(1).sub(1).clamp(min=0)
        mask: Any = is_token
        if self._windows and self._windows.needs_masks(mask):
            mask = self._windows.masks(mask, positions_BT, 0, embeds.dtype)
        return self._layers(embeds, mask, positions_BT, every=True)

    def _layers(
        self, embeds: Tensor, mask: Any, position_ids: Tensor, cache: Any = None, num_skipped: int = 0,
        every: bool = False,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The input of the first layer and the output of each, the last after the final norm; or the last alone."""
        if isinstance(mask, Tensor) and mask.dim() == 2:
            mask = mask.long() if self._windows else unmask_padding(self.base, mask, embeds)
        with self.acceleration.one_pass(embeds, cache is not None, num_skipped):
            output = self.base.base_model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=position_ids,
                use_cache=cache is not None,
                output_hidden_states=every,
                **{self.cache_argument: cache},
            )
        return output.hidden_states if every else (output.last_hidden_state,)

    @torch.no_grad()
    def attention_weights(self, input_ids: Tensor, is_token: Tensor) -> tuple[Tensor, ...]:
        """Of each layer, the attention weights (B, heads, T, T) of rows without thoughts, without dropout.

        Raises ValueError if the model's family cannot give them.
        """
        implementation: Any = self.base.config._attn_implementation
        was_training = self.base.training
        positions_BT = is_token.long().cumsum(1).sub(1).clamp(min=0)
        try:
            self.base.eval()
            self.base.set_attn_implementation("eager")
            output = self.base.base_model(
                input_ids=input_ids, attention_mask=is_token.long(), position_ids=positions_BT, output_attentions=True,
                use_cache=False,
            )  # fmt: skip
        finally:
            self.base.train(was_training)
            self.base.set_attn_implementation(implementation)
        if not output.attentions or any(weights is None for weights in output.attentions):
            raise ValueError(
                f"{self.base.config.model_type} does not give its attention weights, which R-KV needs. Set "
                "term_options.cache.compression=uniform."
            )
        return output.attentions

    @property
    def keeps_all_keys(self) -> bool:
        """Whether every layer keeps keys and values of all positions, as it does without sliding windows."""
        from transformers.cache_utils import DynamicLayer

        return not self._windows and all(isinstance(layer, DynamicLayer) for layer in self.new_cache().layers)

    def embed(self, ids: Tensor) -> Tensor:
        """The input embeddings (..., D) of token ids (...)."""
        return self.base.get_input_embeddings()(ids)

    @torch.no_grad()
    def merged_thoughts(self, spans: Tensor) -> Tensor | None:
        """(B, K, D) the thoughts that a model with merged ones is trained on; None for another model.

        `spans` (B, K, S): token ids of the groups, IGNORED beyond them; `<eot>` is no part of a thought. They are
        constants: no gradient goes through them into the table.
        """
        slot = self.feedback.slot
        if not slot.merges:
            return None
        is_word = (spans != IGNORED) & (spans != self.special.eot)
        return merge(self.embed(spans.clamp(min=0)), is_word, slot.pooling)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Apply the head to last hidden states: (..., D) to (..., V)."""
        head: Any = self.base.get_output_embeddings()
        with self.acceleration.head(hidden_states):
            return families.postprocess_logits(families.text_config(self.base), head(hidden_states))

    def new_cache(self, columns: int = 0, windows: bool = True) -> Any:
        """An empty KV cache for `columns` columns. `windows`: whether a sliding window limits what a layer returns."""
        return self.acceleration.new_cache(columns, windows)
