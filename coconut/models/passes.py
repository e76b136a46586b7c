"""How a batch is cut into forward passes: one pass more than the row with most thoughts has, for all rows together.

Shapes: B rows, T columns as given, S columns as the passes take them, K thoughts of the row that has most.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from coconut.acceleration.cuda_graphs import bucket_up


@dataclass
class PassPlan:
    """How the rows are cut into passes.

    Column t of row b goes to `column_BT[b, t]`; `source_BS` is the way back, -1 where there is only
    padding. Pass k takes the columns `borders[k] : borders[k + 1]`.
    """

    column_BT: Tensor
    source_BS: Tensor
    pass_bounds: list[int]


def plan_passes(
    is_latent_BT: Tensor, is_token_BT: Tensor, min_passes: int = 1, bucket_widths: bool = False
) -> PassPlan:
    """Cut rows at their thoughts so that K + 1 passes serve all of them, or `min_passes` if that is more.

    Each row's last thought stands at the head of the last pass, the one before at the head of the pass
    before, and so on; what precedes a row's first thought is the first pass. All passes but the last
    are padded on the left, so that a pass ends with the state that the next one feeds back. A row
    without thoughts fills the first pass as far as the other rows do and goes on in the last. Further
    passes are cut off the head of the first. With `even`, passes of several columns are made a little wider, so that
    batches are alike.
    """
    B, T = is_token_BT.shape
    tokens_BT = is_token_BT.long()
    seen_BT = is_latent_BT.long().cumsum(1)
    thoughts_B1 = seen_BT[:, -1:]
    K = int(thoughts_B1.max())
    rank_BT = tokens_BT.cumsum(1) - 1
    block_BT = torch.where(seen_BT > 0, K - thoughts_B1 + seen_BT, 0)
    if K:
        prefix_B = (tokens_BT * (seen_BT == 0)).sum(1)
        width = torch.where(thoughts_B1[:, 0] > 0, prefix_B, 0).max()
        block_BT = torch.where((thoughts_B1 == 0) & (rank_BT >= width), K, block_BT)

    count_BK = torch.zeros(B, K + 1, dtype=torch.long, device=block_BT.device).scatter_add(1, block_BT, tokens_BT)
    before_BK = count_BK.cumsum(1) - count_BK
    widths_K = count_BK.amax(0)
    more = max(min_passes - K - 1, 0)
    widths_K[0] = widths_K[0].clamp(min=more + 1)
    if bucket_widths:
        widths_K = torch.tensor([bucket_up(width) if width > 1 else width for width in widths_K.tolist()]).to(widths_K)
    starts_K = widths_K.cumsum(0) - widths_K
    pads_BK = widths_K - count_BK
    pads_BK[:, -1] = 0
    widths = widths_K.tolist()
    S = sum(widths)
    offset_BK = starts_K + pads_BK - before_BK
    column_BT = torch.where(is_token_BT, rank_BT + offset_BK.gather(1, block_BT), S)
    columns_T = torch.arange(T, device=column_BT.device).expand(B, T)
    source_BS = torch.full((B, S + 1), -1, device=column_BT.device).scatter(1, column_BT, columns_T)[:, :S]
    borders = list(range(more + 1))
    for width in [widths[0] - more, *widths[1:]]:
        borders.append(borders[-1] + width)
    return PassPlan(column_BT, source_BS, borders)


def after_last_token(is_token: Tensor) -> Tensor:
    """Where nothing but padding follows. Nothing attends to it, and a mask without it is often a plain causal one."""
    return is_token.long().flip(1).cumsum(1).flip(1) == 0


def previous_token(is_token_BT: Tensor) -> Tensor:
    """(B, T) the column of the token before each column, -1 where there is none."""
    columns_T = torch.arange(is_token_BT.shape[1], device=is_token_BT.device)
    latest_BT = torch.where(is_token_BT, columns_T, -1).cummax(1).values
    return torch.cat([torch.full_like(latest_BT[:, :1], -1), latest_BT[:, :-1]], dim=1)


def unread_columns(read_S: Tensor, borders: list[int]) -> list[int]:
    """In each block, how many columns stand before the first that is read, its last one at the latest."""
    places = [*read_S.nonzero()[:, 0].tolist(), borders[-1]]
    return [min(places[bisect_left(places, start)], stop - 1) - start for start, stop in pairwise(borders)]
