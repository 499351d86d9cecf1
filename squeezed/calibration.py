"""From queries to threshold curves (paper section 3.2, "calibration").

One log threshold per level serves the whole model at a sparsity, so heads that need more keys keep more. Averaging
scores over many queries flattens them, so one curve can't serve both a generated token and a question's prefill: curves
are kept for several numbers of queries that share a selection.

The paper calibrates on the text's last tokens. Their queries ask for less than a user's do: on SmolLM2 a threshold for
70% sparsity then dropped only 64%. Where there is a chat template, a few general questions are therefore put to the
context, and their queries calibrate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from squeezed.errors import InputError
from squeezed.ops import reference
from squeezed.ops.layout import ClusteredKeys

# Where the curve is stored. Level 1 keeps half the keys whenever 70% or more is dropped in the end.
SPARSITIES = (
    0.0,
    *(i / 20 for i in range(1, 14)),
    0.7,
    0.75,
    0.8,
    0.85,
    0.9,
    0.925,
    0.95,
    0.965,
    0.98,
    0.99,
    0.995,
    1.0,
)
QUERY_COUNTS = (1, 4, 16, 64)
_COARSE_SPARSITY = 0.5  # paper section 3.3: level 1 keeps half the keys
_COARSE_FULL = 0.7  # the lowest sparsity of the paper; below it level 1 drops proportionally less, nothing at 0
# Histogram of log scores. A quantile is off by at most one bin: 1/64 in log score.
_LOWEST, _BINS_PER_UNIT = -256.0, 64
_WEIGHTS = {"cpu": 2**18, "cuda": 2**27}  # float64 weights held at once: 2 MB, or 1 GB, whatever the length
_NOTHING = 1e-300  # a sum of weights whose inverse may not be finite: nothing is left of them
_BINS = int(-_LOWEST * _BINS_PER_UNIT) + 1


@dataclass(frozen=True)
class ThresholdCurves:
    """Log score thresholds of the whole model over sparsity.

    Attributes:
        sparsities: [P] float64 ascending from 0 to 1.
        query_counts: [C] int64 ascending, queries that share a selection.
        log_thresholds: [levels, C, P] float64, finest level first; -inf at sparsity 0, +inf at 1.
        errors: [P] float64 ascending, mean relative error of the attention output at each sparsity, see `quality`;
            None if it was not measured.
    """

    sparsities: Tensor
    query_counts: Tensor
    log_thresholds: Tensor
    errors: Tensor | None = None

    @classmethod
    def keep_everything(cls, levels: int) -> ThresholdCurves:
        """Before calibration: no threshold drops anything."""
        grid = torch.tensor([0.0, 1.0], dtype=torch.float64)
        return cls(grid, torch.tensor([1]), torch.full((levels, 1, 2), -math.inf, dtype=torch.float64))

    def at(self, sparsity: float, queries: int) -> tuple[float, ...]:
        """Log threshold of each level, finest first, interpolated in sparsity and in the logarithm of `queries`.

        With coarser levels whose thresholds still change, those of the nearest sparsity that is stored, at most 0.025
        away: a finer threshold fits what is left by the coarser ones that it was found with, and by no others.
        """
        levels = self.log_thresholds.shape[0]
        if levels > 1 and sparsity < _COARSE_FULL:
            stored = self.sparsities[self.sparsities < 1]
            sparsity = float(stored[(stored - sparsity).abs().argmin()])
        if sparsity <= 0:
            return (-math.inf,) * levels
        if sparsity >= 1:
            return (math.inf,) * levels
        counts = self.query_counts.tolist()
        above = next((i for i, count in enumerate(counts) if count >= queries), len(counts) - 1)
        below = above if counts[above] <= queries else above - 1
        share = 0.0
        if above != below:
            share = math.log(queries / counts[below]) / math.log(counts[above] / counts[below])
        found = []
        for curves in self.log_thresholds:
            threshold = _interpolate(self.sparsities, curves[below], sparsity)
            if share:
                threshold = (1 - share) * threshold + share * _interpolate(self.sparsities, curves[above], sparsity)
            found.append(threshold)
        return tuple(found)

    def sparsity_for(self, error: float) -> float:
        """The largest sparsity whose measured error is at most `error`.

        Raises:
            InputError: not a positive number, less than the context's 8-bit keys err with nothing left out, or nothing
                was measured.
        """
        if self.errors is None:
            raise InputError("the context has no measured errors; build it again, or ask for a sparsity")
        if not error > 0:
            raise InputError(f"error is {error}: expected a positive relative error, for example 0.05")
        least = float(self.errors[0])
        if error < least:
            raise InputError(
                f"error is {error}: keys in 8 bits put {least:.2g} on the output by themselves; ask for more, or build "
                "the context with 16-bit keys (preset best)"
            )
        if float(self.errors[-1]) <= error:
            return 1.0
        right = int(torch.searchsorted(self.errors, error, right=True))
        low, high = float(self.errors[right - 1]), float(self.errors[right])
        x_low, x_high = float(self.sparsities[right - 1]), float(self.sparsities[right])
        return x_low + (x_high - x_low) * (error - low) / (high - low)


def _interpolate(xs: Tensor, ys: Tensor, x: float) -> float:
    """Linear between grid points; between a finite and an infinite one, the finite one."""
    right = int(torch.searchsorted(xs, x))
    left = right if float(xs[right]) == x else right - 1
    y_left, y_right = float(ys[left]), float(ys[right])
    if left == right or not math.isfinite(y_right):
        return y_left
    if not math.isfinite(y_left):
        return y_right
    return y_left + (y_right - y_left) * (x - float(xs[left])) / float(xs[right] - xs[left])


def coarse_sparsity(sparsity: float, level: int, levels: int) -> float:
    """Share of the keys that `level` (1 is the finest coarse one) and all coarser ones drop at a final sparsity."""
    own = _COARSE_SPARSITY * (levels - level) / (levels - 1)
    return own * min(1.0, sparsity / _COARSE_FULL)


def outline(layer: ClusteredKeys) -> ClusteredKeys:
    """What calibration reads of a layer: its levels, without keys, values and positions."""
    none = layer.keys[:, :0].clone()
    levels = tuple(replace(level, values=None) for level in layer.levels)
    return replace(layer, keys=none, values=none, positions=layer.positions[:, :0].clone(), levels=levels, sinks=None)


def calibrate(
    layers: Sequence[ClusteredKeys],
    queries: Sequence[Sequence[Tensor]],
    scales: Sequence[float],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> ThresholdCurves:
    """Quantiles of the scores of all layers, heads and keys together, for every sparsity and number of queries.

    Levels are calibrated coarsest first, each on what the coarser thresholds leave, as at question time. One histogram
    of log scores per curve is all that is kept, whatever the length.

    Args:
        layers: the squeezed layers' indices, wherever they are; an `outline` of each will do.
        queries: per layer, segments of consecutive queries [q_heads, length, head_dim] after RoPE.
        scales: per layer, the attention module's scaling.
        on_progress: called with (done, total) after each layer of each pass.
    """
    levels = len(layers[0].levels)
    longest = max(segment.shape[1] for segment in queries[0])
    counts = sorted({min(count, longest) for count in QUERY_COUNTS})
    curves = torch.full((levels, len(counts), len(SPARSITIES)), -math.inf, dtype=torch.float64)
    curves[..., -1] = math.inf
    done, total = 0, levels * len(counts) * len(layers)
    for level in reversed(range(levels)):
        # Sparsities with the same coarser thresholds share one pass over the scores.
        for c, count in enumerate(counts):
            groups: dict[tuple[float, ...], list[int]] = {}
            for p in range(1, len(SPARSITIES) - 1):
                groups.setdefault(tuple(curves[level + 1 :, c, p].tolist()), []).append(p)
            histograms = {coarser: torch.zeros(_BINS, dtype=torch.float64) for coarser in groups}
            for layer, segments, scale in zip(layers, queries, scales, strict=True):
                blocks = torch.cat([_blocks(segment, count) for segment in segments])
                device = blocks.device
                here = outline(layer).to(device)
                step = max(1, _WEIGHTS[device.type] // (blocks.shape[1] * count * layer.levels[level].shape[1]))
                own = torch.zeros(len(histograms), _BINS, dtype=torch.float64, device=device)
                for some in blocks.split(step):
                    own += _histograms(here, level, some, scale, list(histograms))
                for histogram, part in zip(histograms.values(), own.cpu(), strict=True):
                    histogram += part
                done += 1
                on_progress(done, total)
            for coarser, members in groups.items():
                for p in members:
                    target = SPARSITIES[p] if level == 0 else coarse_sparsity(SPARSITIES[p], level, levels)
                    curves[level, c, p] = _quantile(histograms[coarser], target)
    return ThresholdCurves(torch.tensor(SPARSITIES, dtype=torch.float64), torch.tensor(counts), curves)


def _blocks(queries: Tensor, count: int) -> Tensor:
    """[q_heads, length, D] -> [length // count, q_heads, count, D], the last tokens; none if there are too few."""
    blocks = queries.shape[1] // count
    kept = queries[:, queries.shape[1] - blocks * count :]
    return kept.unflatten(1, (blocks, count)).transpose(0, 1)


def _histograms(
    layer: ClusteredKeys, level: int, blocks: Tensor, scale: float, coarser: Sequence[tuple[float, ...]]
) -> Tensor:
    """Keys by log score on one level [T, bins], for T tuples of thresholds of the coarser levels (finest first).

    The same scores as `reference.score_centroids`, but the exponentials are taken once for all tuples: what a coarser
    threshold leaves out only changes the denominators.
    """
    own = layer.levels[level]
    kv_heads, clusters, dim = own.shape
    grouped = blocks.reshape(len(blocks), kv_heads, -1, dim).transpose(0, 1).float()
    # All blocks of a head as rows of one product: block by block, each would get a copy of the centroids.
    logits = reference.centroid_logits(
        grouped.flatten(1, 2).unsqueeze(0), own.centroids, scale, own.spread, layer.scales
    ).view(*grouped.shape[:3], clusters)
    # Padding in 8 bits is no zero: it may be hundreds above all clusters, which would leave nothing of them.
    logits.masked_fill_((own.sizes == 0)[:, None, None], -math.inf)
    # float64: a score may be e^-100 of the row's highest, where float32 has nothing left.
    weights = (logits - logits.amax(-1, keepdim=True)).double().exp_()
    sizes = own.sizes.double()
    everywhere = sizes.unsqueeze(1).expand(-1, len(blocks), -1)
    counts = everywhere.flatten()
    above = _Coarser(layer, blocks, scale)
    found = []
    for thresholds in coarser:
        allowed = above.allowed(level, thresholds)
        if allowed is None:
            present = everywhere
            denominators = (weights.flatten(1, 2) @ sizes.unsqueeze(-1)).view(weights.shape[:3])
        else:
            present = everywhere * allowed.transpose(0, 1)
            denominators = (weights @ present.unsqueeze(-1)).squeeze(-1)
        share = torch.where(denominators > _NOTHING, 1 / denominators, 0.0)
        scores = (share.unsqueeze(2) @ weights).squeeze(2) / weights.shape[2]
        log_scores = scores.log_().masked_fill_(present == 0, -math.inf)
        bins = ((log_scores.clamp_(min=_LOWEST, max=0.0) - _LOWEST) * _BINS_PER_UNIT).long()
        found.append(torch.bincount(bins.flatten(), counts, minlength=_BINS))
    return torch.stack(found)


class _Coarser:
    """What coarser levels leave of a finer one, for many thresholds: scores that several have in common are kept."""

    def __init__(self, layer: ClusteredKeys, blocks: Tensor, scale: float) -> None:
        self._layer, self._blocks, self._scale = layer, blocks, scale
        self._scores: dict[tuple[int, tuple[float, ...]], Tensor] = {}

    def allowed(self, level: int, thresholds: tuple[float, ...]) -> Tensor | None:
        """[blocks, kv_heads, clusters] bool of `level`, by the thresholds of all above it, finest first; None: all."""
        if not thresholds:
            return None
        key = (level + 1, thresholds[1:])
        found = self._layer.levels[level + 1]
        if key not in self._scores:
            self._scores[key] = reference.score_centroids(
                self._blocks,
                found.centroids,
                found.sizes,
                self._scale,
                self.allowed(*key),
                found.spread,
                self._layer.scales,
            )
        selected = reference.select_clusters(self._scores[key], thresholds[0])
        return reference.expand_to_children(selected, found.offsets, self._layer.levels[level].shape[1])


def _quantile(histogram: Tensor, share: float) -> float:
    """Log score below which `share` of the keys lie: linear inside its bin, -inf if that is the first bin."""
    cumulative = histogram.cumsum(0)
    target = share * float(cumulative[-1])
    first = int(torch.searchsorted(cumulative, target))
    if first == 0:
        return -math.inf
    inside = (target - float(cumulative[first - 1])) / max(float(histogram[first]), 1e-300)
    return _LOWEST + (first + inside) / _BINS_PER_UNIT
