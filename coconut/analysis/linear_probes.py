"""Many softmax-linear probes, fitted at once.

Shapes: M probes, each on states of its own; F questions that they are fitted on, N that are measured, D width, R
directions, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coconut.utils.torch_utils import seeded

MAX_ITERATIONS = 40  # of L-BFGS for each fit
ROUNDING = 1e-5  # a coordinate that varies by a smaller share of its size is constant
SEED = 0


def directions(fitted_FMD: Tensor, measured_NMD: Tensor, device: torch.device, most: int) -> tuple[Tensor, Tensor]:
    """The states (M, F, R) and (M, N, R), standardized, along at most `most` principal components.

    Mean, deviation and components are those of the fitting questions. With as many directions as coordinates this is a
    rotation, which changes no probe. With fewer a probe reads a projection.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    R = min(*fitted_FMD.shape[::2], most)
    for m in range(fitted_FMD.shape[1]):
        fitted_FD, measured_ND = fitted_FMD[:, m].to(device), measured_NMD[:, m].to(device)
        std_D, mean_D = torch.std_mean(fitted_FD, dim=0, correction=0)
        size_D = fitted_FD.square().mean(0).sqrt()
        scale_D = torch.where(std_D > ROUNDING * size_D, 1 / std_D, 0)
        fitted_FD, measured_ND = ((states - mean_D) * scale_D for states in (fitted_FD, measured_ND))
        with seeded(SEED, device):
            directions_DR = torch.pca_lowrank(fitted_FD, R, center=False)[2]
        parts.append((fitted_FD @ directions_DR, measured_ND @ directions_DR))
    fitted, measured = zip(*parts, strict=True)
    return torch.stack(fitted), torch.stack(measured)


@dataclass(frozen=True)
class Probes:
    """M softmax-linear probes: weights (M, C, R) and biases (M, C, 1)."""

    weights: Tensor
    biases: Tensor

    def __call__(self, states_MNR: Tensor) -> Tensor:
        """(M, C, N) log-probabilities."""
        return torch.baddbmm(self.biases, self.weights, states_MNR.mT).log_softmax(1)


def fit(
    states_MFR: Tensor, classes_F: Tensor, num_classes: int, weight_decays_M: Tensor, start: Probes | None = None
) -> Probes:
    """Fit M probes at once: the minimum of mean cross-entropy + weight decay / 2 * |weights and change of biases|^2.

    The biases are held to the classes' log frequencies (with half a question added to each), so that a probe that finds
    nothing predicts these. L-BFGS minimizes the sum over the probes, in coordinates in which the curvature at the start
    is about 1. `start`: probes to begin from.
    """
    counts_C = torch.bincount(classes_F, minlength=num_classes).to(states_MFR) + 0.5
    prior_C1 = (counts_C / counts_C.sum())[:, None]
    decays_M11 = weight_decays_M[:, None, None]
    curvature = (prior_C1 * (1 - prior_C1)).mean()
    scale_M1R = (curvature * states_MFR.square().mean(1, keepdim=True) + decays_M11).rsqrt()
    M, F, R = states_MFR.shape
    right = slice(None), classes_F, torch.arange(F, device=classes_F.device)
    start = start or Probes(states_MFR.new_zeros(M, num_classes, R), prior_C1.log().expand(M, -1, 1))
    scaled_MCR = (start.weights / scale_M1R).requires_grad_()
    shifts_MC1 = (start.biases - prior_C1.log()).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [scaled_MCR, shifts_MC1], max_iter=MAX_ITERATIONS, max_eval=10 * MAX_ITERATIONS, line_search_fn="strong_wolfe"
    )

    @torch.no_grad()
    def loss_and_gradient() -> Tensor:
        weights_MCR = scaled_MCR * scale_M1R
        log_probs_MCF = Probes(weights_MCR, prior_C1.log() + shifts_MC1)(states_MFR)
        squares = (decays_M11 * weights_MCR.square()).sum() + (decays_M11 * shifts_MC1.square()).sum()
        loss = squares / 2 - log_probs_MCF[right].sum() / F
        error_MCF = log_probs_MCF.exp_()
        error_MCF[right] -= 1
        scaled_MCR.grad = (error_MCF @ states_MFR / F + decays_M11 * weights_MCR) * scale_M1R
        shifts_MC1.grad = error_MCF.mean(2, keepdim=True) + decays_M11 * shifts_MC1
        return loss

    optimizer.step(loss_and_gradient)  # pyright: ignore[reportArgumentType]
    return Probes((scaled_MCR * scale_M1R).detach(), (prior_C1.log() + shifts_MC1).detach())


def where(condition_M: Tensor, first: Probes, second: Probes) -> Probes:
    """The first probe where the condition holds, the second elsewhere."""
    condition_M11 = condition_M[:, None, None]
    return Probes(
        torch.where(condition_M11, first.weights, second.weights),
        torch.where(condition_M11, first.biases, second.biases),
    )
