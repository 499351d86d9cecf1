"""Peak compute, memory bandwidth and capacity of the devices that predictions know, with their sources.

Peaks are *dense* tensor-core rates for 16-bit inputs with 32-bit accumulation, the arithmetic of attention and of
linear layers in bf16. Capacities are the datasheets' decimal gigabytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from squeezed.errors import InputError


@dataclass(frozen=True)
class Achievable:
    """What software reaches of the datasheet: fractions of its peaks, and the fixed seconds of one operation.

    `eager` is one call timed with events around it, `graph` one operation inside a captured graph.
    """

    bandwidth: float
    matmul: float
    attention: float
    eager: float
    graph: float
    source: str


@dataclass(frozen=True)
class Peak:
    """One way to state a device's peaks: FLOP/s, bytes/s, and under which assumption."""

    assumption: str
    flops: float
    bandwidth: float

    @property
    def ridge(self) -> float:
        """FLOP per byte above which compute is the limit."""
        return self.flops / self.bandwidth


@dataclass(frozen=True)
class Device:
    """A device: FLOP/s, bytes/s, bytes, and which part of them software reaches."""

    name: str
    title: str
    flops: float
    bandwidth: float
    memory: float
    source: str
    achievable: Achievable
    element_bytes: int = 2
    other_peaks: tuple[Peak, ...] = ()

    @property
    def ridge(self) -> float:
        """Ridge point of the datasheet in FLOP per byte."""
        return self.flops / self.bandwidth

    @property
    def peaks(self) -> tuple[Peak, ...]:
        """The datasheet's dense peak, what was achieved, and the other ways in which this device is quoted."""
        reached = self.bandwidth * self.achievable.bandwidth
        return (
            Peak("16-bit dense, 32-bit accumulate (used here)", self.flops, self.bandwidth),
            Peak("achievable, linear layers", self.flops * self.achievable.matmul, reached),
            Peak("achievable, attention", self.flops * self.achievable.attention, reached),
            *self.other_peaks,
        )


# One H100 80GB SXM, torch 2.11, cuDNN 9.19, 2026-11-21; medians over CUDA events after warm-up. Copy of 2 GiB buffers
# 3.02 TB/s; 8192 x 8192 bf16 product 779.5 TFLOP/s; cuDNN attention of 1,024 queries over 512K keys 604 TFLOP/s (dense
# decode at 512K reads at 3.11 TB/s, 3% above a copy, which also writes). A one-element kernel takes 23.4 us between two
# events when called eagerly; decode attention over 128 keys, all fixed cost, takes 4.8 us per call in a CUDA graph.
H100_MEASURED = Achievable(
    bandwidth=3.02 / 3.35,
    matmul=779.5 / 989.4,
    attention=604 / 989.4,
    eager=23.4e-6,
    graph=4.8e-6,
    source="measured on one H100 80GB SXM, torch 2.11, 2026-11-21",
)
ASSUMED = Achievable(
    bandwidth=H100_MEASURED.bandwidth,
    matmul=H100_MEASURED.matmul,
    attention=H100_MEASURED.attention,
    eager=H100_MEASURED.eager,
    graph=H100_MEASURED.graph,
    source="assumed: the fractions measured on the H100",
)


def _gpu(name: str, title: str, tflops: float, gb_s: float, gb: float, source: str, *others: Peak) -> Device:
    achievable = H100_MEASURED if name == "H100" else ASSUMED
    return Device(name, title, tflops * 1e12, gb_s * 1e9, gb * 1e9, source, achievable, other_peaks=others)


def _peak(assumption: str, tflops: float, gb_s: float) -> Peak:
    return Peak(assumption, tflops * 1e12, gb_s * 1e9)


_SPARSE, _FP8 = "2:4 structured sparsity, 16-bit", "FP8 dense"

CATALOGUE = (
    _gpu(
        *("A6000", "NVIDIA RTX A6000 48GB", 154.8, 768, 48),
        "NVIDIA RTX A6000 datasheet; NVIDIA Ampere GA102 GPU Architecture whitepaper, appendix",
        _peak(_SPARSE + " (the datasheet's 'Tensor performance')", 309.7, 768),
        _peak("FP32 without tensor cores", 38.7, 768),
    ),
    _gpu(
        *("A100-40GB", "NVIDIA A100 SXM 40GB", 312, 1555, 40),
        "NVIDIA A100 Tensor Core GPU datasheet",
        _peak(_SPARSE, 624, 1555),
    ),
    _gpu(
        *("A100", "NVIDIA A100 SXM 80GB", 312, 2039, 80),
        "NVIDIA A100 Tensor Core GPU datasheet",
        _peak(_SPARSE, 624, 2039),
        _peak("PCIe card, 16-bit dense", 312, 1935),
    ),
    _gpu(
        *("H100", "NVIDIA H100 SXM 80GB", 989.4, 3350, 80),
        "NVIDIA H100 Tensor Core GPU datasheet; H100 architecture whitepaper",
        _peak(_SPARSE, 1978.9, 3350),
        _peak(_FP8, 1978.9, 3350),
        _peak("PCIe card, 16-bit dense", 756, 2000),
    ),
    _gpu(
        *("H200", "NVIDIA H200 SXM 141GB", 989.4, 4800, 141),
        "NVIDIA H200 Tensor Core GPU datasheet",
        _peak(_SPARSE, 1978.9, 4800),
    ),
    _gpu(
        *("B200", "NVIDIA B200 180GB (HGX)", 2250, 8000, 180),
        "NVIDIA DGX B200 and HGX B200 datasheets, an eighth of the system",
        _peak(_SPARSE, 4500, 8000),
        _peak(_FP8, 4500, 8000),
    ),
    _gpu(
        *("L40S", "NVIDIA L40S 48GB", 362.05, 864, 48),
        "NVIDIA L40S datasheet",
        _peak(_SPARSE, 733, 864),
    ),
    _gpu(
        *("RTX4090", "NVIDIA GeForce RTX 4090 24GB", 165.2, 1008, 24),
        "NVIDIA Ada GPU Architecture whitepaper, appendix",
        _peak("16-bit dense, 16-bit accumulate", 330.3, 1008),
        _peak(_SPARSE + ", 16-bit accumulate", 660.6, 1008),
    ),
)
_ALIASES = {"A100-80GB": "A100", "H100-SXM": "H100", "RTX-4090": "RTX4090", "4090": "RTX4090", "RTX-A6000": "A6000"}


def find_device(name: str) -> Device:
    """The catalogue's device of that name, or this machine measured on the spot for `cpu` and `cuda`."""
    wanted = name.strip().upper().replace(" ", "-").replace("_", "-")
    wanted = _ALIASES.get(wanted, wanted)
    for device in CATALOGUE:
        if device.name.upper() == wanted:
            return device
    if wanted in ("CPU", "CUDA"):
        from squeezed.analysis.probe import measure_device

        return measure_device(wanted.lower())
    known = ", ".join(device.name for device in CATALOGUE)
    raise InputError(f"device {name!r} is not known; choose one of {known}, cpu or cuda (measured on the spot)")
