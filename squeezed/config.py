"""Settings of each stage: frozen dataclasses, validated on construction."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from squeezed.errors import InputError


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise InputError(message)


@dataclass(frozen=True)
class BuildConfig:
    """How a fixed context is prepared.

    Attributes:
        clusters: finest clusters as a share of the clustered keys (paper: 5%); None chooses by the context's length,
            see `clusters_of`.
        levels: number of cluster levels; each coarser level has a fifth of the clusters of the one below (paper: 5%
            and 1%).
        window: observation window w, the last tokens, which are never clustered and always attended (paper: 100).
        sinks: first tokens that are treated likewise. Models park attention on them (StreamingLLM, arXiv 2309.17453),
            and as members of a cluster they are missed: leaving them out of the clusters took the error of SmolLM2's
            attention output at sparsity 0.9 from 0.64 to 0.12. The paper has none.
        metric: `query` clusters keys by the difference that it makes to the context's own queries, see `query_metric`;
            `cosine` by their direction (paper).
        second_order: score clusters by their spread too, at one more number per cluster, see `second_order`. Not in the
            paper.
        compensate: keep each cluster's mean value, and let it stand in for the keys of clusters that are left out
            (Multipole Attention, arXiv 2506.13059). On SmolLM2 that takes 40% off the error of the attention output.
        centroid_bits: 8, or 16 for centroids and their values in the model's own dtype.
        key_bits: 8, or 16 for keys and values in the model's own dtype, as the sinks always are. With 8, half of
            sparsity 0's bytes are read, but it is no longer the model's own attention to rounding.
        voters: most queries of a long question's block by which clusters are scored, see `squeezed.ops.voting`; None:
            all of them (paper).
        recall: tokens of the fixed context that all tokens of an answer attend to because its question has read them
            closely, see `squeezed.recall`; at most an eighth of what is kept; 0 for none (paper), nor any copied ones.
        copying: passages that an answer is copying are attended to as well, see `squeezed.copying`. Not in the paper.
        calibration: whose queries set the thresholds: `questions` asked of the context, or the `window` (paper).
        chunk: tokens per prefill chunk; bounds memory, changes nothing else.
        iterations: most Lloyd iterations of k-means.
    """

    clusters: float | None = None
    levels: int = 1
    window: int = 100
    sinks: int = 4
    metric: str = "query"
    second_order: bool = True
    compensate: bool = True
    centroid_bits: int = 8
    key_bits: int = 16
    voters: int | None = 64
    recall: int = 256
    copying: bool = True
    calibration: str = "questions"
    chunk: int = 512
    iterations: int = 20

    def __post_init__(self) -> None:
        _require(
            self.clusters is None or 0 < self.clusters <= 1,
            f"clusters is {self.clusters}: expected a share of the keys above 0 and at most 1, for example 0.05",
        )
        _require(self.levels in (1, 2, 3), f"levels is {self.levels}: expected 1, 2 or 3")
        _require(self.window >= 1, f"window is {self.window}: expected at least 1 token")
        _require(self.sinks >= 0, f"sinks is {self.sinks}: expected 0 or more tokens")
        _require(self.metric in ("query", "cosine"), f"metric is {self.metric!r}: expected query or cosine")
        for name in ("centroid_bits", "key_bits"):
            bits = getattr(self, name)
            _require(bits in (8, 16), f"{name} is {bits}: expected 8, or 16 for the model's own dtype")
        _require(
            self.centroid_bits <= self.key_bits,
            "centroid_bits is 16 and key_bits 8: more bits for centroids than for keys gain nothing; set both to 8",
        )
        _require(
            self.voters is None or self.voters >= 1, f"voters is {self.voters}: expected at least 1, or None for all"
        )
        _require(self.recall >= 0, f"recall is {self.recall}: expected 0 or more tokens")
        _require(
            self.calibration in ("questions", "window"),
            f"calibration is {self.calibration!r}: expected questions or window",
        )
        _require(self.chunk >= 1, f"chunk is {self.chunk}: expected at least 1 token")
        _require(self.iterations >= 1, f"iterations is {self.iterations}: expected at least 1")

    def clusters_of(self, keys: int) -> int:
        """Number of finest clusters for that many clustered keys.

        Left to itself, 5% as in the paper, but in short contexts up to 30%, to have 2,000: there, centroids cost little
        beside the model's weights, and small clusters are judged better. At 5,500 tokens and sparsity 0.9 SmolLM2's
        attention output errs by 3.1% with 30%, 4.2% with 20% and 6.1% with 10%, and with 20% or fewer a word that one
        head alone looks up may be missed at any sparsity (docs/results/selection-notes.md); at 7,500 with 21%, not
        with 25%.
        """
        share = self.clusters if self.clusters is not None else min(0.3, max(0.05, 2000 / keys))
        return max(1, min(keys, round(share * keys)))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


PRESETS: dict[str, BuildConfig] = {
    "best": BuildConfig(),
    "compact": BuildConfig(key_bits=8),
    "paper": BuildConfig(
        clusters=0.05,
        sinks=0,
        metric="cosine",
        second_order=False,
        compensate=False,
        centroid_bits=16,
        voters=None,
        recall=0,
        copying=False,
        calibration="window",
    ),
}


def find_preset(name: str) -> BuildConfig:
    """The settings of that name. Raises InputError for an unknown one."""
    _require(name in PRESETS, f"preset is {name!r}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def check_sparsity(sparsity: float) -> float:
    """The sparsity itself if it is a share of the fixed context that can be left out.

    Raises:
        InputError: outside 0 to 1, or not a number.
    """
    if not 0.0 <= sparsity <= 1.0:
        raise InputError(f"sparsity is {sparsity}: expected 0 (attend to everything) to 1 (only the window); try 0.9")
    return float(sparsity)


def check_device(device: str) -> str:
    """A device name that torch can use here.

    Raises:
        InputError: not a device, or not present.
    """
    import torch

    try:
        parsed = torch.device(device)
    except RuntimeError:
        parsed = None
    if parsed is None or parsed.type not in ("cpu", "cuda"):
        raise InputError(f"device is {device!r}: expected cpu or cuda; pass --device cpu")
    if parsed.type == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda, but torch finds no CUDA device here; pass --device cpu")
    return str(parsed)
