"""Loading the model to evaluate, here or in a worker process."""

from __future__ import annotations

from dataclasses import dataclass

from squeezed.evaluation.prepared import Subject


@dataclass(frozen=True)
class Loader:
    """Loads a model; can be sent to another process. Its fields are those of the command line."""

    model: str
    device: str
    dtype: str
    workers: int = 1

    def __call__(self, worker: int = 0) -> Subject:
        """The model of one worker process; workers take the GPUs there are in turn."""
        import torch
        from transformers.utils import logging

        from squeezed.cli.options import parse_dtype
        from squeezed.models import load_model

        logging.disable_progress_bar()
        if self.workers > 1:
            torch.set_num_threads(1)
            if self.device == "cuda":
                torch.cuda.set_device(worker % torch.cuda.device_count())
        return Subject.of(*load_model(self.model, self.device, parse_dtype(self.dtype)))
