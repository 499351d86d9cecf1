"""Models of a real shape with random weights, and fixed contexts planted for them: speed without the download.

The keys are planted (`squeezed.bench.planted`), so that a context of 256K tokens needs no prefill and attention is as
uneven as a real model's: the query projections are scaled until the heads' logits deviate as the planted heads' do.
What such a model writes means nothing; how long it takes does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from squeezed.bench.planted import Planted, copies, planted_context, sharpness_of_heads
from squeezed.cache import FixedLayer, Selection, SqueezedCache
from squeezed.calibration import ThresholdCurves, calibrate
from squeezed.config import PRESETS, BuildConfig
from squeezed.decode.loop import prefill
from squeezed.errors import InputError
from squeezed.models import attention_modules
from squeezed.recall import Recall, observes
from squeezed.storage import store

_DISTINCT = 2  # layers that are planted and clustered; the others are copies in memory of their own
_QUESTION = 64  # tokens of the question that calibrates

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 2**21,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 2**21,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": True,
    },
}


def random_model(shape: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of that shape, made on the device.

    Raises:
        InputError: no such shape.
    """
    if shape not in SHAPES:
        raise InputError(f"shape is {shape!r}: expected one of {', '.join(SHAPES)}")
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=dtype, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    return model.eval()


class PlantedContext:
    """A fixed context for a random model, calibrated on the model's own queries.

    Attributes:
        tokens: number of fixed tokens.
        config: levels, how the layers are kept, who votes, and what is recalled and copied; planted clusters have no
            spread.
        text: [tokens] int64, random tokens.
        layers: one per decoder layer.
        curves: thresholds for every sparsity.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: int,
        config: BuildConfig = PRESETS["paper"],
        on_stage: Callable[[str], None] = lambda stage: None,
    ) -> None:
        shape = model.config
        self.tokens, self.config = tokens, config
        self._shape = Planted(
            tokens,
            shape.num_attention_heads,
            shape.num_key_value_heads,
            shape.head_dim,
            coarse_share=0.01 if config.levels > 1 else None,
            dtype=model.dtype,
        )
        self.text = torch.randint(shape.vocab_size, (tokens,), generator=torch.Generator().manual_seed(4))
        on_stage(f"planting {tokens} tokens")
        count, kinds = shape.num_hidden_layers, min(_DISTINCT, shape.num_hidden_layers)
        shares = [count // kinds + (kind < count % kinds) for kind in range(kinds)]
        planted = (planted_context(self._shape, str(model.device), seed) for seed in range(kinds))
        self.layers = [layer for made, share in zip(planted, shares, strict=True) for layer in copies(made, share)]
        self.curves = ThresholdCurves.keep_everything(config.levels)
        on_stage("calibrating")
        self._sharpen(model, self._observe(model))
        self.layers = [store(layer, config) for layer in self.layers]
        segments = [[query[0]] for query in self._observe(model)]
        modules: list[Any] = attention_modules(model)
        self.curves = calibrate(self.layers, segments, [module.scaling for module in modules])

    def cache(self, sparsity: float, dense: bool = False, adaptive: bool = False) -> SqueezedCache:
        """A fresh cache for one question."""
        voters = self.config.voters
        selection = Selection(None if dense else self.curves, sparsity, voters=voters, adaptive=adaptive, whole=None)
        recall = None if dense else Recall.at(sparsity, self.config, self.layers, self.text)
        return SqueezedCache(
            [
                FixedLayer(layer, selection, layer.tokens, recall=recall, observes=observes(number, len(self.layers)))
                for number, layer in enumerate(self.layers)
            ]
        )

    def inputs(self, ids: list[int], device: torch.device) -> dict[str, Tensor]:
        """input_ids and attention_mask of a question."""
        mask = torch.ones(1, self.tokens + len(ids), dtype=torch.int64, device=device)
        return {"input_ids": torch.tensor([ids], device=device), "attention_mask": mask}

    def _observe(self, model: PreTrainedModel) -> list[Tensor]:
        """Each layer's queries [1, q_heads, m, head_dim] of a random question, every key attended."""
        ids = torch.randint(model.config.vocab_size, (_QUESTION,), generator=torch.Generator().manual_seed(3)).tolist()
        cache = self.cache(0.0, dense=True)
        observed: list[Tensor] = []
        for layer in cache.fixed_layers:
            layer.observed = observed
        with torch.inference_mode():
            prefill(model, {**self.inputs(ids, model.device), "past_key_values": cache})
        return observed

    def _sharpen(self, model: PreTrainedModel, observed: list[Tensor]) -> None:
        """Scale each group's query projection until its logits deviate as `Planted.sharpness` has it."""
        wanted = sharpness_of_heads(self._shape, model.device)
        modules: list[Any] = attention_modules(model)
        for module, layer, query in zip(modules, self.layers, observed, strict=True):
            sample = layer.keys[:, : layer.clustered : max(1, layer.clustered // 4096)].float()
            grouped = query[0].reshape(len(wanted), -1, query.shape[-1]).float()
            found = (module.scaling * grouped @ sample.transpose(-1, -2)).std(-1).mean(-1)
            rows = module.q_proj.weight
            factor = (wanted / found).repeat_interleave(rows.shape[0] // len(wanted))
            with torch.no_grad():
                rows.mul_(factor[:, None].to(rows.dtype))
