"""How a clustered layer is stored: mean values for its centroids, and 8 bits for what bears it.

One scale and centre per head and channel hold the whole range, with nothing clipped. On SmolLM2 at 7,500 tokens keys
and values in 8 bits put 0.8% on the attention output, if the first tokens stay out: their keys lie so far off that with
them it is 2.6%. (Scales per row give 1.0%, fp8 e4m3 6.6%: real keys have large constant channels.)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from squeezed.config import BuildConfig
from squeezed.ops.layout import ChannelScales, ClusteredKeys, ClusterLevel

_LARGEST = 127.0


def store(layer: ClusteredKeys, config: BuildConfig) -> ClusteredKeys:
    """The layer as `config` wants it kept."""
    if config.compensate:
        layer = add_centroid_values(layer)
    if config.centroid_bits == 8 or config.key_bits == 8:
        layer = to_eight_bits(layer, keys_too=config.key_bits == 8, sinks=config.sinks)
    return layer


def add_centroid_values(layer: ClusteredKeys) -> ClusteredKeys:
    """The layer with the mean value of every cluster of every level, of the values' dtype."""
    clustered = layer.values[:, : layer.clustered]
    levels = tuple(
        replace(level, values=_run_means(clustered, level.sizes).to(layer.values.dtype)) for level in layer.levels
    )
    return replace(layer, levels=levels)


def to_eight_bits(layer: ClusteredKeys, keys_too: bool, sinks: int = 0) -> ClusteredKeys:
    """Centroids and their values as int8, and with `keys_too` the keys and values as well, but for the sinks.

    Args:
        sinks: how many of the tokens behind the clustered ones to keep as the model made them.
    """
    finest = layer.levels[0]
    apart = slice(layer.clustered, layer.clustered + sinks)
    clustered = layer.values[:, : layer.clustered]
    if keys_too:
        keys, values = ([rows[:, : apart.start], rows[:, apart.stop :]] for rows in (layer.keys, layer.values))
    else:
        keys = [_without_padding(finest.centroids, finest.sizes)]
        values = [clustered if finest.values is None else _without_padding(finest.values, finest.sizes)]
    scales = ChannelScales(*_scale_and_centre(*keys), *_scale_and_centre(*values))
    levels = tuple(_level(level, scales) for level in layer.levels)
    if not keys_too:
        return replace(layer, levels=levels, scales=scales)
    return replace(
        layer,
        levels=levels,
        scales=scales,
        keys=_stored(layer.keys, *scales[:2]),
        values=_stored(layer.values, *scales[2:]),
        sinks=(layer.keys[:, apart].clone(), layer.values[:, apart].clone()) if sinks else None,
    )


def _level(level: ClusterLevel, scales: ChannelScales) -> ClusterLevel:
    values = None if level.values is None else _stored(level.values, *scales[2:])
    return replace(level, centroids=_stored(level.centroids, *scales[:2]), values=values)


def _without_padding(rows: Tensor, sizes: Tensor) -> Tensor:
    """Padding is 0, which may lie far outside a channel's range: the first cluster takes its place."""
    return torch.where((sizes > 0).unsqueeze(-1), rows, rows[:, :1])


def _run_means(rows: Tensor, sizes: Tensor) -> Tensor:
    """Mean of each run of `sizes` consecutive rows: [H, n, D], [H, K] int32 -> [H, K, D] float32; 0 for empty runs."""
    from squeezed.clustering.steps import run_means  # here, since that package stores what it has laid out

    return run_means(rows, None, torch.nn.functional.pad(sizes.long().cumsum(1), (1, 0)))


def _scale_and_centre(*parts: Tensor) -> tuple[Tensor, Tensor]:
    """Of all rows of [H, n, D] parts; those without rows do not count."""
    parts = tuple(rows for rows in parts if rows.shape[1])
    low = torch.stack([rows.amin(dim=1) for rows in parts]).amin(dim=0).float()
    high = torch.stack([rows.amax(dim=1) for rows in parts]).amax(dim=0).float()
    return ((high - low) / (2 * _LARGEST)).clamp(min=1e-12), (high + low) / 2


def _stored(rows: Tensor, scale: Tensor, centre: Tensor) -> Tensor:
    stored = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    for head in range(rows.shape[0]):
        scaled = (rows[head].float() - centre[head]) / scale[head]
        stored[head] = scaled.round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)
    return stored
