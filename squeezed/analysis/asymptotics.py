"""The asymptotic table: FLOPs, memory operations and arithmetic intensity of prefill and generation.

Nothing here is derived by hand. Widened by a factor, a decoder's exact counts are polynomials in batch B, length S,
generated tokens k and width d; they are recovered exactly, in rationals, by interpolation on a grid, and the terms that
cannot be bounded by another (with k <= S) are the table. The tests run the same fit on counts of real forward passes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

from squeezed.analysis.cost import Cost, Kind, Precision, Step, decode, dense_operations, prefill, total
from squeezed.analysis.shape import Layer, Matrix, ModelShape

# A monomial is the exponents of (B, S, k, d); a polynomial maps monomials to coefficients.
Monomial = tuple[int, ...]
Polynomial = dict[Monomial, Fraction]

_SYMBOLS = ("B", "S", "k", "d")
_DEGREES = (1, 2, 2, 2)
_POWERS = {1: "", 2: "²", 3: "³", 4: "⁴"}


@dataclass(frozen=True)
class Row:
    """One line of the table: what it is about, and the three cells as text."""

    phase: str
    part: str
    flops: str
    memory: str
    intensity: str


def widened(model: ModelShape, factor: int) -> ModelShape:
    """The same decoder, every width and the number of heads times `factor`; windows and routing taken out.

    The table is about full attention; experts count as the ones a token passes through.
    """
    layers = tuple(
        Layer(
            count=layer.count,
            q_heads=layer.q_heads * factor,
            kv_heads=layer.kv_heads * factor,
            head_dim=layer.head_dim,
            window=None,
            matrices=tuple(
                Matrix(m.part, m.inputs * factor, m.outputs * factor, m.bias * factor)
                for m in layer.matrices
                for _ in range(m.active)
            ),
        )
        for layer in model.layers
    )
    head = replace(model.head, inputs=model.head.inputs * factor)
    return replace(model, hidden=model.hidden * factor, layers=layers, head=head)


def interpolate(function: Callable[..., int], degrees: tuple[int, ...], start: int = 1) -> Polynomial:
    """The polynomial of at most `degrees` through `function` on the grid start .. start + degree of each variable.

    Exact for any polynomial within the degrees; `function` is called prod(degree + 1) times, each value once.
    """
    axes = [range(start, start + degree + 1) for degree in degrees]
    values = {point: Fraction(function(*point)) for point in itertools.product(*axes)}
    for axis, nodes in enumerate(axes):
        bases = [_lagrange(nodes, node) for node in nodes]
        turned: dict[Monomial, Fraction] = {}
        for point, value in values.items():
            for power, coefficient in enumerate(bases[point[axis] - start]):
                key = (*point[:axis], power, *point[axis + 1 :])
                turned[key] = turned.get(key, Fraction(0)) + value * coefficient
        values = turned
    return {monomial: value for monomial, value in values.items() if value}


def evaluate(polynomial: Polynomial, point: tuple[int, ...]) -> Fraction:
    """The value of a polynomial at `point`."""
    result = Fraction(0)
    for monomial, coefficient in polynomial.items():
        for base, exponent in zip(point, monomial, strict=True):
            coefficient *= base**exponent
        result += coefficient
    return result


def leading(polynomial: Mapping[Monomial, Fraction]) -> frozenset[Monomial]:
    """Monomials not bounded by another one, given that no more tokens are generated than the context holds (k <= S)."""
    return frozenset(m for m in polynomial if not any(m != other and _bounded(m, other) for other in polynomial))


def counted(model: ModelShape, phase: str, kind: Kind | None, measure: Callable[[Cost], float]) -> Polynomial:
    """Exact polynomial in (B, S, k, d / hidden) of one measure (FLOPs or elements moved) of the decoder."""

    def count(batch: int, length: int, tokens: int, factor: int) -> int:
        wide = widened(model, factor)
        one_byte = Precision(1, 1, 1)
        steps: list[Step] = [prefill(batch, length)]
        if phase == "generation":
            steps = [decode(batch, length + i) for i in range(tokens)]
        return int(sum(measure(total(dense_operations(wide, step, one_byte), kind)) for step in steps))

    degrees = _DEGREES if phase == "generation" else (*_DEGREES[:2], 0, _DEGREES[3])
    polynomial = interpolate(count, degrees)
    beyond = (5, 11, 7 if phase == "generation" else 1, 6)
    if evaluate(polynomial, beyond) != count(*beyond):
        raise AssertionError(f"{phase} of {model.name}: the counts are no polynomial of degrees {degrees}")
    return polynomial


def table(model: ModelShape) -> list[Row]:
    """Linear layers, attention and the whole, for prefill of S tokens and generation of k tokens after S."""
    rows = []
    parts: tuple[tuple[str, Kind | None], ...] = (("linear", "linear"), ("attention", "attention"), ("aggregate", None))
    for phase in ("prefill", "generation"):
        for part, kind in parts:
            flops = leading(counted(model, phase, kind, lambda cost: cost.flops))
            memory = leading(counted(model, phase, kind, lambda cost: cost.bytes))
            rows.append(Row(phase, part, f"O({_sum(flops)})", f"O({_sum(memory)})", f"O({_ratio(flops, memory)})"))
    return rows


def _lagrange(nodes: range, node: int) -> list[Fraction]:
    """Coefficients, constant first, of the polynomial that is 1 at `node` and 0 at the other nodes."""
    coefficients = [Fraction(1)]
    for other in nodes:
        if other != node:
            shifted = [Fraction(0), *coefficients]
            scaled = [c * -other for c in coefficients] + [Fraction(0)]
            coefficients = [(a + b) / (node - other) for a, b in zip(shifted, scaled, strict=True)]
    return coefficients


def _bounded(small: Monomial, large: Monomial) -> bool:
    batch, length, tokens, width = range(4)
    return (
        small[batch] <= large[batch]
        and small[width] <= large[width]
        and small[length] <= large[length]
        and small[length] + small[tokens] <= large[length] + large[tokens]
    )


def _ratio(above: frozenset[Monomial], below: frozenset[Monomial]) -> str:
    common = tuple(min(m[i] for m in above | below) for i in range(4))
    above, below = (frozenset(_divided(m, common) for m in terms) for terms in (above, below))
    if len(above) == 1 and len(below) == 1:
        shared = tuple(min(a, b) for a, b in zip(*above, *below, strict=True))
        above, below = (frozenset(_divided(m, shared) for m in terms) for terms in (above, below))
    if below == {(0, 0, 0, 0)}:
        return _sum(above)
    divisor = _sum(below) if len(below) == 1 and sum(next(iter(below))) == 1 else f"({_sum(below)})"
    return f"{_sum(above) if len(above) == 1 else f'({_sum(above)})'} / {divisor}"


def _divided(monomial: Monomial, by: Monomial) -> Monomial:
    return tuple(a - b for a, b in zip(monomial, by, strict=True))


def _sum(terms: frozenset[Monomial]) -> str:
    return " + ".join(_product(monomial) for monomial in sorted(terms, key=lambda m: (-sum(m), m)))


def _product(monomial: Monomial) -> str:
    order = (2, 0, 1, 3)  # k first, as in kBSd
    return "".join(f"{_SYMBOLS[i]}{_POWERS[monomial[i]]}" for i in order if monomial[i]) or "1"
