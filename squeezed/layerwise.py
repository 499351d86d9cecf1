"""Running a decoder one layer at a time, whatever family it is of.

The decoder's own forward makes embeddings, positions and masks; its layers are stood in for. Those before the wanted
one hand on what they get, the wanted one is given the hidden states that are wanted, and there the pass ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from squeezed.attention import attached
from squeezed.errors import InputError


class LayerRunner:
    """A model whose layers can be called one by one.

    Raises:
        InputError: the decoder does more than to pass hidden states from each layer to the next.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.layers = list(model.get_decoder().layers)
        self._as_tuple = _hands_on_tuples(model, self.layers)

    def step(self, number: int, hidden: Tensor | None, cache: Cache, **inputs: Any) -> Tensor:
        """Hidden states [B, tokens, hidden size] after layer `number`.

        Args:
            hidden: what goes into the layer; None for the embeddings of `input_ids`, at layer 0.
            cache: as the whole model would have it; only the layer's own entry is written to.
            inputs: input_ids [B, tokens] and whatever else the decoder takes.
        """
        with torch.no_grad(), attached(self.model), self._stand_ins(number, hidden):
            try:
                self.model.get_decoder()(**inputs, past_key_values=cache, use_cache=True)
            except _Reached as reached:
                return reached.hidden
        raise AssertionError("the layer was not reached")

    @contextmanager
    def _stand_ins(self, number: int, hidden: Tensor | None) -> Iterator[None]:
        own = self.layers[number]
        real = own.forward

        def skip(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden_states,) if self._as_tuple else hidden_states

        def stop(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            out = real(hidden_states if hidden is None else hidden, *args, **kwargs)
            raise _Reached(out[0] if isinstance(out, tuple) else out)

        before = [layer.__dict__.get("forward") for layer in self.layers[: number + 1]]  # accelerate puts its own there
        for layer in self.layers[:number]:
            layer.forward = skip
        own.forward = stop
        try:
            yield
        finally:
            for layer, forward in zip(self.layers, before, strict=False):
                if forward is None:
                    del layer.forward  # the class's own shows again
                else:
                    layer.forward = forward


class _Reached(Exception):  # noqa: N818  (no error: the pass has come to its end)
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _hands_on_tuples(model: PreTrainedModel, layers: list[torch.nn.Module]) -> bool:
    """Whether the layers return tuples; a pass over a few tokens shows that they are a plain chain."""
    seen: list[tuple[int, Tensor, Any]] = []

    def record(number: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            seen.append((number, args[0] if args else kwargs["hidden_states"], out))

        return hook

    hooks = [layer.register_forward_hook(record(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        with torch.no_grad():
            model.get_decoder()(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    outs = [out[0] if isinstance(out, tuple) else out for _, _, out in seen]
    chained = all(seen[i + 1][1] is outs[i] for i in range(len(seen) - 1))
    if [number for number, _, _ in seen] != list(range(len(layers))) or not chained:
        raise InputError(
            f"{model.config.model_type} does more than to pass hidden states from each layer to the next; "
            "expected a plain decoder, such as Qwen3 or Llama"
        )
    return isinstance(seen[0][2], tuple)
