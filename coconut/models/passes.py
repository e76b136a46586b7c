"""How a batch is cut into forward passes: one more than the largest number of thoughts in a row, for all rows together.

Shapes: B rows, T columns as given, S columns as the passes take them, K thoughts of the row with the most,
N targets, L layers, D hidden, V vocabulary; of a cache H heads, M columns that are read, d head size.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from coconut.data.batching import IGNORED


@dataclass
class LatentOutput:
    """`loss_sum`: summed negative log-likelihood of the `num_targets` targets; None without labels.

    `logits` (B, T, V), at every position, only with return_logits=True. With return_target_logits=True there is no loss
    but `target_logits` (N, V), which predict the `targets` (N,) of the rows `target_rows` (N,), row by row. `states`,
    `thoughts`, `before_thoughts`, `keys`, `values` and `own_thoughts`: see Reads.
    """

    loss_sum: Tensor | None = None
    num_targets: int = 0
    logits: Tensor | None = None
    target_logits: Tensor | None = None
    targets: Tensor | None = None
    target_rows: Tensor | None = None
    states: Tensor | None = None
    thoughts: Tensor | None = None
    before_thoughts: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    own_thoughts: Tensor | None = None

    @property
    def loss(self) -> Tensor | None:
        """Mean over the targets."""
        return None if self.loss_sum is None else self.loss_sum / max(self.num_targets, 1)


@dataclass(frozen=True)
class Reads:
    """What is wanted of a batch besides the hidden states that predict targets; columns of -1 give zeros.

    `columns_B`: a column of each row whose states in all layers are wanted: `LatentOutput.states` (B, L + 1, D), the
    input of the first layer, then the output of each, the last one after the final norm. `thoughts_BK`: columns of
    thoughts, which are wanted as they are fed: `LatentOutput.thoughts` (B, K, D). `before_thoughts`: whether the last
    hidden states of the tokens before them are wanted too: `LatentOutput.before_thoughts` (N + 1, B, K, D), after 0 to
    N iterations of thoughts that are updated all at once, otherwise with N = 0. `cached_BM`: columns whose keys and
    values are wanted as the cache holds them in the end: `LatentOutput.keys` and `values` (B, L, H, M, d).
    `own_thoughts`: whether it is wanted what the model would feed in the place of each thought, after those before it,
    which may be given: `LatentOutput.own_thoughts` (B, K, D), zero after a row's last.
    """

    columns_B: Tensor | None = None
    thoughts_BK: Tensor | None = None
    before_thoughts: bool = False
    cached_BM: Tensor | None = None
    own_thoughts: bool = False

    def columns_before(self, is_token_BT: Tensor) -> Tensor:
        """(B, K) the columns of the tokens before the thoughts, if they are wanted; -1 where there are none."""
        if self.thoughts_BK is None or not self.before_thoughts:
            return torch.full_like(is_token_BT[:, :0], -1, dtype=torch.long)
        return torch.where(
            self.thoughts_BK < 0, -1, previous_token(is_token_BT).gather(1, self.thoughts_BK.clamp(min=0))
        )

    def mark(self, is_read_BT: Tensor, is_token_BT: Tensor) -> Tensor:
        """(B, T) the positions whose last hidden state is read, for the targets and for these."""
        if self.columns_B is None and not self.before_thoughts:
            return is_read_BT
        columns_BK = self.columns_before(is_token_BT)
        if self.columns_B is not None:
            columns_BK = torch.cat([columns_BK, self.columns_B[:, None]], dim=1)
        columns_T = torch.arange(is_read_BT.shape[1], device=is_read_BT.device)
        return is_read_BT | (columns_T == columns_BK[..., None]).any(1)


def gather_columns(values_BSD: Tensor, columns_BK: Tensor) -> Tensor:
    """(B, K, D) the values at these columns, zero for columns of -1 and columns that do not exist."""
    exists_BK1 = ((columns_BK >= 0) & (columns_BK < values_BSD.shape[1]))[..., None]
    index_BK1 = columns_BK.clamp(0, values_BSD.shape[1] - 1)[..., None]
    return torch.where(exists_BK1, values_BSD.gather(1, index_BK1.expand(-1, -1, values_BSD.shape[2])), 0)


def at_thoughts(values_BKD: Tensor, is_latent_BT: Tensor) -> Tensor:
    """(B, T, D) the values at a row's first thought, second, and so on; zero at all other columns."""
    return gather_columns(values_BKD, torch.where(is_latent_BT, is_latent_BT.long().cumsum(1) - 1, -1))


def read_cache(cache: Any, columns_BM: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values (B, L, H, M, d) of a cache at these columns, zero for columns of -1."""

    def of_layer(values_BHSd: Tensor) -> Tensor:
        B, H, S, d = values_BHSd.shape
        by_head_XSd = values_BHSd.reshape(B * H, S, d)
        return gather_columns(by_head_XSd, columns_BM.repeat_interleave(H, dim=0)).unflatten(0, (B, H))

    keys, values = ([of_layer(getattr(layer, name)) for layer in cache.layers] for name in ("keys", "values"))
    return torch.stack(keys, dim=1), torch.stack(values, dim=1)


@dataclass(frozen=True)
class PassesOutput:
    """Last hidden states (B, S, D), valid where they are read; the column of each token in them (B, T); the Reads.

    `iterations`: of each iteration of thoughts that are updated all at once, the states (B, K, D) before the thoughts.
    """

    hidden_BSD: Tensor
    columns_BT: Tensor
    states_BLD: Tensor | None = None
    thoughts_BKD: Tensor | None = None
    iterations: tuple[Tensor, ...] = ()
    keys_values: tuple[Tensor, Tensor] | None = None


class CollectedReads:
    """What passes over S columns leave behind: their last hidden states, and what `reads` asks for."""

    def __init__(self, reads: Reads):
        self.reads = reads
        self.hidden: list[Tensor] = []
        self.embeds: list[Tensor] = []
        self.states: list[tuple[Tensor, Tensor]] = []  # rows, and their states in all layers
        self.columns = [] if reads.columns_B is None else reads.columns_B.tolist()

    def needs_layers(self, start: int, stop: int, is_last: bool) -> bool:
        """Whether states of this pass are wanted in all layers. Those of the last one are read in any case."""
        return bool(self.columns) and (is_last or any(start <= column < stop for column in self.columns))

    def add(self, embeds_BTD: Tensor, layers: tuple[Tensor, ...], start: int) -> None:
        self.hidden.append(layers[-1])
        if self.reads.thoughts_BK is not None:
            self.embeds.append(embeds_BTD)
        if self.columns and len(layers) > 1:
            rows = [row for row, column in enumerate(self.columns) if start <= column < start + embeds_BTD.shape[1]]
            columns_M = embeds_BTD.new_tensor([self.columns[row] - start for row in rows], dtype=torch.long)
            rows_M = embeds_BTD.new_tensor(rows, dtype=torch.long)
            self.states.append((rows_M, torch.stack([layer[rows_M, columns_M] for layer in layers], dim=1)))

    def output(self, cache: Any = None) -> PassesOutput:
        """All but the columns of the tokens, which the plan of the passes has. `cache`: after all passes."""
        hidden_BSD = torch.cat(self.hidden, dim=1) if len(self.hidden) > 1 else self.hidden[0]
        states_BLD = thoughts_BKD = None
        if self.states:
            rows, states = map(torch.cat, zip(*self.states, strict=True))
            states_BLD = states.new_zeros(len(hidden_BSD), *states.shape[1:]).index_copy(0, rows, states)
        if self.reads.thoughts_BK is not None:
            thoughts_BKD = gather_columns(torch.cat(self.embeds, dim=1), self.reads.thoughts_BK)
        keys_values = None if self.reads.cached_BM is None else read_cache(cache, self.reads.cached_BM)
        return PassesOutput(hidden_BSD, hidden_BSD.new_zeros(0), states_BLD, thoughts_BKD, keys_values=keys_values)


@dataclass
class LatentInputs:
    """A batch as forward takes it, with defaults filled in. See LatentLM.forward.

    `offsets_BKD`: what is added to thoughts, None for nothing. `given_BKD`: what is fed in their place, offsets
    included; None for the model's own. `expected_BTD`: what gates mix into words.
    """

    ids_BT: Tensor
    is_token_BT: Tensor
    is_latent_BT: Tensor
    positions_BT: Tensor
    offsets_BKD: Tensor | None = None
    given_BKD: Tensor | None = None
    expected_BTD: Tensor | None = None

    @classmethod
    def of(
        cls, ids: Tensor, attention_mask: Tensor | None, positions: Tensor | None, latent_id: int,
        offsets: Tensor | None = None, given: Tensor | None = None, expected: Tensor | None = None,
    ) -> LatentInputs:  # fmt: skip
        """Raises ValueError if a row begins with a thought, or has more thoughts than are given."""
        is_token_BT = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        is_latent_BT = (ids == latent_id) & is_token_BT
        begins_with_thought_B = (is_latent_BT & (is_token_BT.long().cumsum(1) == 1)).any(1)
        if begins_with_thought_B.any():
            row = int(begins_with_thought_B.nonzero()[0])
            raise ValueError(f"Row {row} begins with a thought; a thought needs a token before it to come from.")
        if given is not None:
            most = int(is_latent_BT.sum(1).max())
            if given.dim() != 3 or len(given) != len(ids) or given.shape[1] < most:
                raise ValueError(
                    f"thoughts has the shape {tuple(given.shape)}, with {len(ids)} rows of up to {most} thoughts. It "
                    "must be (rows, thoughts, hidden)."
                )
        if positions is None:
            positions = is_token_BT.long().cumsum(1).sub(1).clamp(min=0)
        if given is not None and offsets is not None:
            given, offsets = given + offsets, None
        return cls(ids, is_token_BT, is_latent_BT, positions.expand_as(ids), offsets, given, expected)

    def with_given(self, embeds_BTD: Tensor, is_latent_BT: Tensor) -> Tensor:
        """(B, T, D) the embeddings with the given thoughts in their places, if there are any."""
        if self.given_BKD is None or not self.given_BKD.shape[1]:
            return embeds_BTD
        return torch.where(
            is_latent_BT[..., None], at_thoughts(self.given_BKD.to(embeds_BTD), is_latent_BT), embeds_BTD
        )

    def offsets_at(self, is_latent_BT: Tensor) -> Tensor | None:
        """(B, T, D) the offsets at the columns of a row's thoughts, zero at all others."""
        return None if self.offsets_BKD is None else at_thoughts(self.offsets_BKD, is_latent_BT)


@dataclass
class PassPlan:
    """Where each column goes.

    Column t of row b goes to `column_BT[b, t]`, or S if it is padding. `source_BS` is the inverse, -1 for padding.
    Pass k takes the columns `pass_bounds[k] : pass_bounds[k + 1]`. `bucketed`: see `plan_passes`.
    """

    column_BT: Tensor
    source_BS: Tensor
    pass_bounds: list[int]
    bucketed: bool = False

    @property
    def is_token_BS(self) -> Tensor:
        return self.source_BS >= 0

    def gather(self, values_BT: Tensor) -> Tensor:
        """(B, S) the values in the order of the passes; padding has those of column 0."""
        return values_BT.gather(1, self.source_BS.clamp(min=0))

    def in_passes(self, reads: Reads) -> Reads:
        """The same reads, with columns in the order of the passes."""

        def moved(columns_BK: Tensor) -> Tensor:
            return torch.where(columns_BK < 0, -1, self.column_BT.gather(1, columns_BK.clamp(min=0)))

        columns_B, thoughts_BK, cached_BM = reads.columns_B, reads.thoughts_BK, reads.cached_BM
        return replace(
            reads,
            columns_B=None if columns_B is None else moved(columns_B[:, None])[:, 0],
            thoughts_BK=None if thoughts_BK is None else moved(thoughts_BK),
            cached_BM=None if cached_BM is None else moved(cached_BM),
        )

    def count_skipped(self, is_read_BT: Tensor) -> list[int]:
        """For each pass, how many positions precede the first whose hidden state is read. The last always is."""
        is_read_S = (self.gather(is_read_BT) & self.is_token_BS).any(0)
        read = [*is_read_S.nonzero()[:, 0].tolist(), self.pass_bounds[-1]]
        bounds = list(pairwise(self.pass_bounds))
        skipped = [min(read[bisect_left(read, start)], stop - 1) - start for start, stop in bounds]
        if not self.bucketed:
            return skipped
        all_but_last = [stop - start - 1 for start, stop in bounds]
        return [n if n == most else bucket_down(n) for n, most in zip(skipped, all_but_last, strict=True)]


def plan_passes(
    is_latent_BT: Tensor,
    is_token_BT: Tensor,
    min_passes: int = 1,
    bucket_widths: bool = False,
    reads: Reads | None = None,
) -> PassPlan:
    """Cut rows at their thoughts so that K + 1 passes serve all of them, or `min_passes` if that is more.

    Each row's last thought begins the last pass, the one before it the pass before, and so on. What precedes a row's
    first thought is in the first pass. All passes but the last are padded on the left: a pass ends with the hidden
    state that the next one feeds back. A row without thoughts fills the first pass as far as the other rows do and
    continues in the last one, where also the column stands whose states are wanted in all layers: processes that share
    a model must take them from the same pass. Passes beyond K + 1 are single columns cut off the head of the first.
    `bucket_widths` widens passes of several columns a little, so that few different shapes occur.
    """
    seen_BT = is_latent_BT.long().cumsum(1)
    thoughts_B1 = seen_BT[:, -1:]
    K = int(thoughts_B1.max())
    block_BT = torch.where(seen_BT > 0, K - thoughts_B1 + seen_BT, 0)
    if K:
        block_BT = torch.where((thoughts_B1 == 0) & _goes_on(seen_BT, is_token_BT, reads), K, block_BT)
    extra = max(min_passes - K - 1, 0)
    count_BK = _count_tokens(block_BT, is_token_BT, K + 1)
    widths_K = count_BK.amax(0)
    widths_K[0] = widths_K[0].clamp(min=extra + 1)
    if bucket_widths:
        widths_K = torch.tensor([bucket_up(width) if width > 1 else width for width in widths_K.tolist()]).to(widths_K)
    plan = _laid_out(block_BT, is_token_BT, count_BK, widths_K)
    return replace(plan, pass_bounds=[*range(extra + 1), *plan.pass_bounds[1:]], bucketed=bucket_widths)


def plan_blocks(is_latent_BT: Tensor, is_token_BT: Tensor, reads: Reads | None = None) -> PassPlan:
    """Cut rows before and after their thoughts, so that the thoughts of all rows are one block of columns.

    Its passes are what precedes the thoughts, the thoughts, and the rest. The first two are padded on the left and have
    at least one column. A row without thoughts is divided as in `plan_passes`.

    Raises ValueError if something stands between the thoughts of a row.
    """
    seen_BT = is_latent_BT.long().cumsum(1)
    thoughts_B1 = seen_BT[:, -1:]
    if (is_token_BT & ~is_latent_BT & (seen_BT > 0) & (seen_BT < thoughts_B1)).any():
        raise ValueError("Thoughts that are updated all at once must stand together, and other tokens are among them.")
    block_BT = torch.where(is_latent_BT, 1, torch.where(seen_BT > 0, 2, 0))
    block_BT = torch.where((thoughts_B1 == 0) & _goes_on(seen_BT, is_token_BT, reads), 2, block_BT)
    count_BK = _count_tokens(block_BT, is_token_BT, 3)
    widths_K = count_BK.amax(0)
    widths_K[:2] = widths_K[:2].clamp(min=1)
    return _laid_out(block_BT, is_token_BT, count_BK, widths_K)


def _goes_on(seen_BT: Tensor, is_token_BT: Tensor, reads: Reads | None) -> Tensor:
    """(B, T) what of a row without thoughts is left for the last pass. `seen_BT`: thoughts up to each column."""
    tokens_BT = is_token_BT.long()
    prefix_B = (tokens_BT * (seen_BT == 0)).sum(1)
    width = torch.where(seen_BT[:, -1] > 0, prefix_B, 0).max()
    goes_on_BT = tokens_BT.cumsum(1) - 1 >= width
    if reads and reads.columns_B is not None:
        columns_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        goes_on_BT |= (columns_T >= reads.columns_B[:, None]) & (reads.columns_B[:, None] >= 0)
    return goes_on_BT


def _count_tokens(block_BT: Tensor, is_token_BT: Tensor, blocks: int) -> Tensor:
    """(B, blocks) the tokens of each row in each block."""
    none_BK = torch.zeros(len(block_BT), blocks, dtype=torch.long, device=block_BT.device)
    return none_BK.scatter_add(1, block_BT, is_token_BT.long())


def _laid_out(block_BT: Tensor, is_token_BT: Tensor, count_BK: Tensor, widths_K: Tensor) -> PassPlan:
    """The plan in which block k of each row takes `widths_K[k]` columns; all but the last are padded on the left.

    `count_BK`: the tokens of each row in each block.
    """
    B, T = is_token_BT.shape
    before_BK = count_BK.cumsum(1) - count_BK
    pads_BK = widths_K - count_BK
    pads_BK[:, -1] = 0
    offset_BK = widths_K.cumsum(0) - widths_K + pads_BK - before_BK
    bounds = [0, *widths_K.cumsum(0).tolist()]
    rank_BT = is_token_BT.long().cumsum(1) - 1
    column_BT = torch.where(is_token_BT, rank_BT + offset_BK.gather(1, block_BT), bounds[-1])
    columns_T = torch.arange(T, device=column_BT.device).expand(B, T)
    source_BS = torch.full((B, bounds[-1] + 1), -1, device=column_BT.device).scatter(1, column_BT, columns_T)
    return PassPlan(column_BT, source_BS[:, : bounds[-1]], bounds)


def bucket_up(width: int) -> int:
    """The width of the bucket: less than an eighth wider, or the next multiple of 8."""
    step = max(8, 2 ** (width.bit_length() - 4))
    return -(-width // step) * step


def bucket_down(count: int) -> int:
    """The next smaller bucket of a count of skipped positions. Coarser: it only decides what is left out."""
    return count - count % max(8, 2 ** (count.bit_length() - 2))


def previous_token(is_token_BT: Tensor) -> Tensor:
    """(B, T) the column of the token before each column, -1 where there is none."""
    columns_T = torch.arange(is_token_BT.shape[1], device=is_token_BT.device)
    latest_BT = torch.where(is_token_BT, columns_T, -1).cummax(1).values
    return torch.cat([torch.full_like(latest_BT[:, :1], -1), latest_BT[:, :-1]], dim=1)


@dataclass
class Targets:
    """The tokens to predict, row by row: `ids_N` in `rows_N`, from the hidden states of the columns `sources_N`.

    `is_source_BT`: the same columns as a mask.
    """

    ids_N: Tensor
    rows_N: Tensor
    sources_N: Tensor
    is_source_BT: Tensor

    @classmethod
    def of(cls, labels: Tensor, is_token_BT: Tensor) -> Targets:
        previous_BT = previous_token(is_token_BT)
        rows_N, columns_N = ((labels != IGNORED) & is_token_BT & (previous_BT >= 0)).nonzero(as_tuple=True)
        sources_N = previous_BT[rows_N, columns_N]
        is_source_BT = torch.zeros_like(is_token_BT)
        is_source_BT[rows_N, sources_N] = True
        return cls(labels[rows_N, columns_N], rows_N, sources_N, is_source_BT)
