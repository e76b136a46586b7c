"""LatentLM: a Hugging Face causal language model that can feed its last hidden state back as input.

Wherever `input_ids` holds the latent token, the embedding is replaced by the last hidden state, after
the final norm, of the token before it (Hao et al., arXiv 2412.06769, section 3). Nothing is detached.

Two implementations with one meaning. The cached one cuts the rows into blocks at their thoughts and
runs each position once, thoughts + 1 passes in all; `use_cache=False` runs the whole rows again for
every thought, and is the one to read first.

Shapes: B rows, T columns as given, S columns as the passes take them, D hidden, V vocabulary,
K thoughts of the row that has most, N targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from coconut.acceleration.attention import attend_to_self_mask, has_fully_masked_query, patched_sdpa
from coconut.acceleration.cuda_graphs import CudaGraphs, bucket_down
from coconut.acceleration.final_layer import FinalLayer
from coconut.acceleration.kv_cache import AppendOnlyCache
from coconut.acceleration.linear import deferred_weight_gradients, onednn_linear, sparse_embedding_gradient
from coconut.data.batching import IGNORED
from coconut.data.tokenization import ADDED_TOKENS, SpecialIds, add_control_tokens, add_special_tokens, token_ids
from coconut.methods import REASONING_FILE, Reasoning, parse_mode
from coconut.models.families import (
    EXPERTS,
    TESTED,
    SlidingWindow,
    cache_argument,
    check_family,
    check_head,
    fuse_gelu,
    max_sequence_length,
    postprocess_logits,
    text_config,
    weights_materialized,
)
from coconut.models.losses import summed_cross_entropy, target_log_probs
from coconut.models.passes import after_last_token, plan_passes, previous_token, unread_columns
from coconut.models.serialization import FORMAT_VERSION, load_base, read_record
from coconut.models.token_embeddings import initialize_tokens, resize_tables
from coconut.utils.files import apply_umask, write_json
from coconut.utils.pretrained import load_pretrained, resolve_local_path
from coconut.utils.torch_utils import eval_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from coconut.config import LoraConfig
    from coconut.generation.generate import Generated
    from coconut.models.lora import Adapter


@dataclass
class LatentOutput:
    """`loss_sum`: summed negative log-likelihood of the `num_targets` targets; None without labels.

    `logits` (B, T, V), at every position, only with return_logits=True. With return_target_logits=True no loss is
    made but `target_logits` (N, V), those that predict the `targets` (N,), row by row.
    """

    loss_sum: Tensor | None = None
    num_targets: int = 0
    logits: Tensor | None = None
    target_logits: Tensor | None = None
    targets: Tensor | None = None

    @property
    def loss(self) -> Tensor | None:
        """Mean over the targets."""
        return None if self.loss_sum is None else self.loss_sum / max(self.num_targets, 1)


class LatentLM(nn.Module):
    """A causal language model, its tokenizer, and how it is to reason. The model is kept as `base`."""

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        special: SpecialIds,
        reasoning: Reasoning | None = None,
        new_tokens: dict[str, Any] | None = None,
    ):
        super().__init__()
        fuse_gelu(base)
        self.base = base
        self._windows = SlidingWindow.of(base)
        self.cache_argument = cache_argument(base)
        self._last_layer = FinalLayer.of(base) if text_config(base).model_type in TESTED else None
        self.tokenizer = tokenizer
        self.special = special
        self.reasoning = reasoning or Reasoning()
        self.new_tokens = new_tokens or {}
        self.adapter: Adapter | None = None
        self._activation_checkpointing = False
        self._graphs: CudaGraphs | None = None

    # --- making, saving, loading ------------------------------------------------------------------

    @classmethod
    def from_base(
        cls,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        init: str = "mean",
        reasoning: Reasoning | None = None,
    ) -> LatentLM:
        """Wrap a causal language model; add `<bot>`, `<eot>`, `<latent>`, `<pause>` where they are missing.

        `base` is kept and changed: its tables grow, and GPT-2's GELU is computed in one kernel.

        `init` says what the embeddings of new tokens start from: "mean" of the table, "random" (normal
        with the table's standard deviation), or any one token of the tokenizer by its name.

        Raises ValueError if the model is of a family that cannot be fed its own states (docs/models.md), if the
        tokenizer has no end-of-sequence token or more entries than the model, or if it does not know the token
        that `init` names.
        """
        check_family(base)
        check_head(base)
        table: Any = base.get_input_embeddings()
        old = len(tokenizer)
        if table.num_embeddings < old:
            raise ValueError(
                f"The tokenizer has {old} entries and the model's embedding table only {table.num_embeddings}: "
                "they do not belong together. Load both from the same place."
            )
        if init not in ("mean", "random") and init not in tokenizer.get_vocab():
            raise ValueError(f'init={init!r} is neither "mean", "random" nor a token of this tokenizer.')
        if text_config(base).model_type not in TESTED and weights_materialized(base):
            _check_fed(base, tokenizer)
        special = add_special_tokens(tokenizer)
        resize_tables(base, len(tokenizer))
        new_ids = list(range(old, len(tokenizer)))
        initialize_tokens(base, new_ids, old, init, tokenizer)
        new_tokens = {"init": init, "tokens": tokenizer.convert_ids_to_tokens(new_ids)}
        return cls(base, tokenizer, special, reasoning, new_tokens)

    def add_modes(self, modes: Sequence[str], init: str = "mean") -> None:
        """Make it a hybrid model: it chooses with its first token from these modes (coconut.methods.mode_named).

        Their control tokens are added where they are missing, with embeddings that start from `init`.
        Raises ValueError for a mode that is none, or if the model has LoRA already, whose added tokens are settled.
        """
        missing = [parse_mode(name).token for name in modes if name not in self.special.control]
        if missing and self.adapter:
            raise ValueError(f"This model has LoRA, and no rows for {', '.join(missing)}. Merge it first: lm.merged().")
        old = len(self.tokenizer)
        self.special = add_control_tokens(self.tokenizer, self.special, modes)
        resize_tables(self.base, len(self.tokenizer))
        new_ids = list(range(old, len(self.tokenizer)))
        initialize_tokens(self.base, new_ids, old, init, self.tokenizer)
        self.reasoning = replace(self.reasoning, modes=tuple(modes))
        if new_ids:
            added = self.tokenizer.convert_ids_to_tokens(new_ids)
            self.new_tokens = {**self.new_tokens, "control": {"init": init, "tokens": added}}

    def add_lora(self, settings: LoraConfig, place: str) -> None:
        """Train from now on a LoRA correction and the added tokens' embeddings; all else is frozen.

        `place`: the name or folder that `base` was loaded from, and will be loaded from again: only what is
        trained is saved. Raises ValueError if peft is missing, if a target is no linear layer of the model,
        or if the model has LoRA already.
        """
        from coconut.models.lora import Adapter, attach

        if self.adapter:
            raise ValueError("This model has LoRA already. Write it whole first: lm.merged().save_pretrained(FOLDER).")
        adapter = Adapter.of(self.base, place, settings)
        attach(self.base, self.special.added, settings, adapter.base)
        self.adapter = adapter

    def merged(self) -> LatentLM:
        """A copy without LoRA that computes the same: the correction is written into the weights."""
        if not self.adapter:
            raise ValueError("This model has no LoRA to merge; it is whole already.")
        from coconut.models.lora import merged

        return LatentLM(merged(self.base), self.tokenizer, self.special, self.reasoning, self.new_tokens)

    def save_pretrained(self, folder: Path | str, max_shard_size: str = "5GB") -> None:
        """Write weights, tokenizer and reasoning. AutoModelForCausalLM and AutoTokenizer open the folder too.

        Weights larger than `max_shard_size` are split into several files. Of a LoRA model only what is trained
        is written; `merged` gives one that is written whole.
        """
        if self.adapter:
            from coconut.models.lora import save

            save(self.base, folder)
        else:
            self.base.save_pretrained(folder, max_shard_size=max_shard_size)
        for file in Path(folder).glob("*.safetensors"):  # which are written for their owner alone
            apply_umask(file)
        self.tokenizer.save_pretrained(folder)
        write_json(
            Path(folder) / REASONING_FILE,
            {
                "format_version": FORMAT_VERSION,
                "reasoning": self.reasoning.as_dict(),
                "new_tokens": self.new_tokens,
                "special": asdict(self.special),
                "lora": asdict(self.adapter) if self.adapter else None,
            },
        )

    def push_to_hub(self, name: str, private: bool = True) -> None:
        """Put it with a card on the Hugging Face hub as OWNER/NAME; `coconut export` adds a run's numbers.

        Raises ValueError if the hub does not take it.
        """
        from tempfile import TemporaryDirectory

        from coconut.hub.model_card import card
        from coconut.hub.push import push

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            (Path(folder) / "README.md").write_text(card(self, name=name), encoding="utf-8")
            push(Path(folder), name, private)

    @classmethod
    def from_pretrained(cls, folder: Path | str, attention: str | None = None, base: str | None = None) -> LatentLM:
        """Load what `save_pretrained` wrote, a folder or OWNER/NAME on the hub. No embedding is initialised again.

        `attention`: transformers' attn_implementation, which a saved model does not keep. `base`: where the
        model that LoRA corrects lies, if not where it lay. Raises FileNotFoundError or ValueError if the
        folder is no such model.
        """
        from transformers import AutoTokenizer

        folder = resolve_local_path(folder)
        values, special, reasoning = read_record(folder)
        tokenizer = load_pretrained(AutoTokenizer, folder)
        tokens = [*ADDED_TOKENS, *(parse_mode(name).token for name in special.control)]
        if token_ids(tokenizer, tokens) != special.added:
            raise ValueError(f"The tokenizer in {folder} is not the one that the model was saved with.")
        if not values.get("lora"):
            return cls(load_base(folder, attention), tokenizer, special, reasoning, values["new_tokens"])
        from coconut.models.lora import Adapter, load

        adapter = Adapter.from_dict(values["lora"])
        under = adapter.open_base(base, attention)
        resize_tables(under, len(tokenizer))
        lm = cls(under, tokenizer, special, reasoning, values["new_tokens"])
        lm.add_lora(adapter.settings, base or adapter.base)
        load(lm.base, folder)
        return lm

    @property
    def latent_id(self) -> int:
        return self.special.latent

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def max_sequence_length(self) -> int:
        """The longest sequence that the model takes, in tokens."""
        return max_sequence_length(text_config(self.base))

    @property
    def activation_checkpointing(self) -> bool:
        """Whether layers run again in the backward pass instead of keeping their activations.

        Losses and gradients are the same, with dropout (train()) and without (eval()). Setting it raises ValueError if
        the model's layers cannot.
        """
        return self._activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, wanted: bool) -> None:
        if wanted:
            from coconut.acceleration.activation_checkpointing import check_recomputable

            check_recomputable(self.base)
        self._activation_checkpointing = wanted

    @property
    def cuda_graphs(self) -> bool:
        """Whether a GPU starts the passes of a training batch with thoughts as one (`acceleration.cuda_graphs`).

        Elsewhere it does nothing. Losses and gradients are the same but for rounding; with dropout other numbers are
        drawn. Setting it raises ValueError if what the model does hangs on more than a batch's shape.
        """
        return self._graphs is not None

    @cuda_graphs.setter
    def cuda_graphs(self, wanted: bool) -> None:
        config = text_config(self.base)
        if wanted and (self._windows or any(getattr(config, name, None) for name in EXPERTS)):
            raise ValueError(
                f"{config.model_type}: which {'columns are seen' if self._windows else 'experts are asked'} hangs on "
                "more than a batch's shape, and its passes cannot be CUDA graphs. Leave engine.cuda_graphs=false."
            )
        self._graphs = CudaGraphs(self.base) if wanted else None

    @property
    def _recomputes_now(self) -> bool:
        return self._activation_checkpointing and torch.is_grad_enabled()

    def new_cache(self, columns: int = 0, windows: bool = True) -> AppendOnlyCache:
        """An empty cache for `states`, with room for so many columns from the start.

        `windows`: whether a layer with a sliding window is given no more than that.
        """
        return AppendOnlyCache(self.base.config, columns, windows)

    # --- the feedback loop ------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_logits: bool = False,
        return_target_logits: bool = False,
        use_cache: bool = True,
        min_passes: int = 1,
    ) -> LatentOutput:
        """Run a batch; a thought stands wherever `input_ids` is the latent token.

        All arguments are (B, T). Padding may stand on either side, and rows may differ in how many
        thoughts they have and where. `position_ids` come from the mask by default. `labels` follow the
        convention of transformers: the label of a column is the token in it, -100 where there is no
        target. A label on the first token of a row is not counted: nothing precedes it. The rows take at
        least `min_passes` passes: processes that share one model have to keep step.

        Raises ValueError if a row begins with a thought, or if gradient checkpointing is on together
        with the cache (transformers would then drop the cache, and thoughts would lose their context).
        """
        is_token_BT = _is_token(input_ids, attention_mask)
        targets = None if labels is None else _Targets.of(labels, is_token_BT)
        read_BT = is_token_BT if return_logits else torch.zeros_like(is_token_BT)
        if targets and not return_logits:
            read_BT[targets.rows_N, targets.sources_N] = True
        hidden_BSD, columns_BT = self._hidden(input_ids, is_token_BT, position_ids, read_BT, use_cache, min_passes)
        output = LatentOutput()
        if targets:
            states_ND = hidden_BSD[targets.rows_N, columns_BT[targets.rows_N, targets.sources_N]]
            targets_N = targets.ids_N
            output.num_targets = len(targets_N)
            if return_target_logits:
                output.target_logits, output.targets = self.logits(states_ND), targets_N
            else:
                output.loss_sum = summed_cross_entropy(self.logits(states_ND), targets_N)
        if return_logits:
            index = columns_BT.clamp(max=hidden_BSD.shape[1] - 1)
            output.logits = self.logits(hidden_BSD.gather(1, index[..., None].expand(-1, -1, hidden_BSD.shape[2])))
        return output

    def log_probs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        use_cache: bool = True,
    ) -> Tensor:
        """(N,) log-probability of each target in float32, row by row, in the order of the tokens."""
        if labels is None:
            raise ValueError("log_probs needs labels: they say which tokens to score (-100 elsewhere).")
        found = self(input_ids, attention_mask, position_ids, labels, return_target_logits=True, use_cache=use_cache)
        return target_log_probs(found.target_logits, found.targets)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int | None = None, **options: Any
    ) -> Generated:
        """Think, then speak: `coconut.generation.generate.generate` with this model."""
        from coconut.generation.generate import generate

        return generate(self, input_ids, attention_mask, max_new_tokens=max_new_tokens, **options)

    def _hidden(
        self,
        input_ids: Tensor,
        is_token_BT: Tensor,
        position_ids: Tensor | None,
        read_BT: Tensor,
        use_cache: bool,
        min_passes: int,
    ) -> tuple[Tensor, Tensor]:
        """The last hidden states (B, S, D), right where they are read, and in which of their columns each of the T
        given ones is.
        """
        is_latent_BT = (input_ids == self.latent_id) & is_token_BT
        if position_ids is None:
            position_ids = is_token_BT.long().cumsum(1).sub(1).clamp(min=0)
        if use_cache:
            position_ids = position_ids.expand_as(input_ids)
            return self._cached(input_ids, is_token_BT, is_latent_BT, position_ids, read_BT, min_passes)
        return self._recomputed(input_ids, is_token_BT, is_latent_BT, position_ids)

    def _cached(
        self,
        input_ids: Tensor,
        is_token_BT: Tensor,
        is_latent_BT: Tensor,
        position_ids: Tensor,
        read_BT: Tensor,
        min_passes: int,
    ) -> tuple[Tensor, Tensor]:
        graphs = self._graphs if self._may_replay and is_latent_BT.any() else None
        way = plan_passes(is_latent_BT, is_token_BT, min_passes, bucket_widths=graphs is not None)
        source_BS, is_token_BS = way.source_BS.clamp(min=0), way.source_BS >= 0
        self._refuse_headless(is_latent_BT, is_token_BT)
        is_latent_BS = is_latent_BT.gather(1, source_BS) & is_token_BS
        positions_BS = position_ids.gather(1, source_BS)
        unread = unread_columns((read_BT.gather(1, source_BS) & is_token_BS).any(0), way.pass_bounds)
        with sparse_embedding_gradient(self.base):
            embeds_BSD = self.base.get_input_embeddings()(input_ids.gather(1, source_BS))
        given = embeds_BSD, is_token_BS, is_latent_BS, positions_BS
        if graphs is None:
            return self._run_blocks(*given, way.pass_bounds, unread), way.column_BT
        widths = [stop - start for start, stop in pairwise(way.pass_bounds)]
        unread = [n if n == w - 1 else bucket_down(n) for n, w in zip(unread, widths, strict=True)]
        passes = partial(self._run_blocks, borders=way.pass_bounds, unread=unread)
        shape = tuple(way.pass_bounds), tuple(unread)
        return graphs.run(shape, passes, given, self._trained_in_passes()), way.column_BT

    @property
    def _may_replay(self) -> bool:
        return (
            self.training
            and torch.is_grad_enabled()
            and self.device.type == "cuda"
            and not self._activation_checkpointing
        )

    def _trained_in_passes(self) -> list[Tensor]:
        """All weights that are trained but those of the tables."""
        both: list[Any] = [self.base.get_input_embeddings(), self.base.get_output_embeddings()]
        tables = {weight for table in both for weight in table.parameters()}
        return [weight for weight in self.base.parameters() if weight.requires_grad and weight not in tables]

    def _run_blocks(
        self,
        embeds_BSD: Tensor,
        is_token_BS: Tensor,
        is_latent_BS: Tensor,
        positions_BS: Tensor,
        borders: list[int],
        unread: list[int],
    ) -> Tensor:
        """The loop: one pass a block, each beginning with the state that the one before ended with. (B, S, D).

        Of a block's states the first so many as `unread` says are not made whole.
        """
        several = len(borders) > 2
        if several and self._checkpointed:
            raise ValueError(
                "Gradient checkpointing switches the cache off inside transformers, and the thoughts would lose "
                "their context without a word. Turn it off (gradient_checkpointing_disable) and set "
                "activation_checkpointing=True "
                "on the LatentLM, or run the plain path with use_cache=False."
            )
        windows = self._windows if self._windows and self._windows.matter(is_token_BS) else None
        cache = self.new_cache(borders[-1], windows=windows is None) if several else None
        attended_BS = is_token_BS | after_last_token(is_token_BS)
        states, last_BD = [], None
        with self._over_passes() if several else nullcontext():
            for (start, stop), first in zip(pairwise(borders), unread, strict=True):
                block_BSD = embeds_BSD[:, start:stop]
                if last_BD is not None:
                    fed_B1D = last_BD[:, None].to(block_BSD)
                    block_BSD = torch.where(is_latent_BS[:, start:stop, None], fed_B1D, block_BSD)
                mask_BS = attended_BS[:, :stop]
                mask = windows.masks(mask_BS, positions_BS[:, :stop], start, block_BSD.dtype) if windows else mask_BS
                hidden_BSD = self.hidden_states(block_BSD, mask, positions_BS[:, start:stop], cache, num_skipped=first)
                states.append(hidden_BSD)
                ends_here_B1 = is_token_BS[:, stop - 1, None]
                end_BD = hidden_BSD[:, -1]
                last_BD = end_BD if last_BD is None else torch.where(ends_here_B1, end_BD, last_BD)
        return torch.cat(states, dim=1) if several else states[0]

    def _recomputed(
        self, input_ids: Tensor, is_token_BT: Tensor, is_latent_BT: Tensor, position_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The plain path: for each thought in turn, run everything and copy one state forward."""
        self._refuse_headless(is_latent_BT, is_token_BT)
        embeds_BTD = self.base.get_input_embeddings()(input_ids)
        previous_BT = previous_token(is_token_BT).clamp(min=0)
        number_BT = is_latent_BT.long().cumsum(1) * is_latent_BT
        mask: Any = is_token_BT
        if self._windows and self._windows.matter(is_token_BT):
            mask = self._windows.masks(is_token_BT, position_ids.expand_as(input_ids), 0, embeds_BTD.dtype)
        for number in range(1, int(number_BT.max()) + 1):
            hidden_BTD = self.hidden_states(embeds_BTD, mask, position_ids)
            before_BTD = hidden_BTD.gather(1, previous_BT[..., None].expand_as(hidden_BTD)).to(embeds_BTD)
            embeds_BTD = torch.where((number_BT == number)[..., None], before_BTD, embeds_BTD)
        columns_BT = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        return self.hidden_states(embeds_BTD, mask, position_ids), columns_BT

    def hidden_states(
        self, embeds: Tensor, mask: Any, position_ids: Tensor, cache: Any = None, *, num_skipped: int = 0
    ) -> Tensor:
        """The model without its head: the last hidden states (B, T, D), after the final norm.

        `embeds` (B, T, D) are input embeddings; `mask` covers them and what the cache holds, (B, S) or as the
        base takes masks that are made for it. The cache, of `new_cache`, is extended by them. The first `unread`
        columns (below T) are there for the cache: what comes back for them means nothing.
        """
        if isinstance(mask, Tensor) and mask.dim() == 2:
            mask = (
                mask.long()
                if self._windows or not has_fully_masked_query(self.base, mask, embeds)
                else attend_to_self_mask(mask, embeds)
            )
        around = partial(self._as_pays, embeds, cache is not None, num_skipped)
        with self._layers_as_set(around), around():
            output = self.base.base_model(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=position_ids,
                use_cache=cache is not None,
                **{self.cache_argument: cache},
            )
        return output.last_hidden_state

    def _over_passes(self) -> AbstractContextManager[None]:
        if not torch.is_grad_enabled() or self._recomputes_now:
            return nullcontext()
        return deferred_weight_gradients(self.base)

    @contextmanager
    def _as_pays(self, embeds: Tensor, cached: bool, columns: int) -> Iterator[None]:
        """Within, a pass over `embeds` makes its first so many columns for the cache alone, and computes as pays.

        But not where transformers would run its layers again, which it does when this is over.
        """
        if self._checkpointed:
            yield
            return
        last = self._last_layer.skip_positions(self.base, columns) if self._last_layer and columns else nullcontext()
        with onednn_linear(self.base.base_model, embeds), patched_sdpa(embeds, cached), last:
            yield

    @property
    def _checkpointed(self) -> bool:
        """By transformers, which is not `activation_checkpointing`."""
        return self.training and any(getattr(part, "gradient_checkpointing", False) for part in self.base.modules())

    def _layers_as_set(self, around: Callable[[], AbstractContextManager[Any]]) -> AbstractContextManager[None]:
        if not self._recomputes_now:
            return nullcontext()
        from coconut.acceleration.activation_checkpointing import recomputing

        return recomputing(self.base, around)

    def logits(self, states: Tensor) -> Tensor:
        """What the head makes of last hidden states: (..., D) to (..., V)."""
        head: Any = self.base.get_output_embeddings()
        with onednn_linear(head, states):
            return postprocess_logits(text_config(self.base), head(states))

    @staticmethod
    def _refuse_headless(is_latent_BT: Tensor, is_token_BT: Tensor) -> None:
        headless = (is_latent_BT & (is_token_BT.long().cumsum(1) == 1)).any(1)
        if headless.any():
            row = int(headless.nonzero()[0])
            raise ValueError(f"Row {row} begins with a thought; a thought needs a token before it to come from.")


@torch.no_grad()
def _check_fed(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises ValueError if rows of unequal thoughts in a batch are not what each of them is by itself, recomputed."""
    rows = [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3], [3, 4, 5, 7, 8, 8, 8, 9, 0, 1, 2, 3, 4]]  # 8 stands for a thought
    special = SpecialIds(bot=7, eot=9, latent=8, pause=10, eos=10, pad=10)
    if len(tokenizer) <= special.pad:
        return
    lm = LatentLM(base, tokenizer, special)
    ids = torch.tensor(rows, device=lm.device)
    with eval_mode(lm):
        together = lm(ids, return_logits=True).logits
        alone = [lm(row[None], return_logits=True, use_cache=False).logits for row in ids]
    assert together is not None
    ours, theirs = together.float(), torch.cat([found for found in alone if found is not None]).float()
    apart = float((ours - theirs).norm() / (theirs - theirs.mean(-1, keepdim=True)).norm().clamp(min=1e-6))
    if apart > (0.3 if base.dtype in (torch.float16, torch.bfloat16) else 1e-3):
        raise ValueError(
            f"{text_config(base).model_type} cannot be fed its own states: this project has not tested the family, and "
            "two short rows in a batch with its cache give other logits than each of them recomputed "
            f"({apart:.1g} apart, relative to their norm)."
        )


def _is_token(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    return torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()


@dataclass
class _Targets:
    """The tokens to predict, row by row: `ids_N`, in rows `rows_N`, from the states of the columns `sources_N`."""

    ids_N: Tensor
    rows_N: Tensor
    sources_N: Tensor

    @classmethod
    def of(cls, labels: Tensor, is_token_BT: Tensor) -> _Targets:
        previous_BT = previous_token(is_token_BT)
        rows_N, places_N = ((labels != IGNORED) & is_token_BT & (previous_BT >= 0)).nonzero(as_tuple=True)
        return cls(labels[rows_N, places_N], rows_N, previous_BT[rows_N, places_N])
