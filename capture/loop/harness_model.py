"""A model as lm-eval-harness asks it, with a method in the loop or with none."""

import contextlib
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from retrace.capture.attention.interface import observed_attention
from retrace.capture.loop.approximate import Approximator
from retrace.capture.model.lengths import forget_lengths
from retrace.capture.reading.harness import quiet_harness
from retrace.traces import RetraceError
from retrace.traces.progress import ShowDone


class HarnessModel(HFLM):  # type: ignore[misc]
    """A causal language model of transformers, loaded, for `lm_eval.evaluate` and the like.

    Texts that are scored are read at once, and their attention is the `approximator`'s, from its
    first position on. Prompts that are continued are read exactly, unless it begins earlier, and
    decoding is the method's. Without an approximator all is exact.

    Requests are read one by one: methods answer each row of a batch by itself, so that batches
    would gain nothing, and padding would stand where keys do.

    Raises:
        RetraceError: the tokenizer has no token to put before a text that has no context.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int | None = None) -> None:
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise RetraceError(
                "The tokenizer has no token that begins or ends a text, and lm-eval-harness needs "
                "one: this model cannot be scored on its tasks."
            )
        with quiet_harness():
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=1,
                max_length=max_length,
            )
        self.approximator: Approximator | None = None
        self.progress: ShowDone = lambda done, total: None
        """Told how many of how many requests are done."""
        self._done = self._total = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """Log-likelihoods of continuations, and whether each is what would be decoded greedily."""
        with self._counted(len(requests)):
            found: list[Any] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """Log-likelihoods of whole documents, window by window."""
        with self._counted(len(requests)):
            found: list[Any] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model continues prompts by."""
        most = max(r.args[1].get("max_gen_toks", self.max_gen_toks) for r in requests)
        if most >= self.max_length:
            raise RetraceError(
                f"{requests[0].task_name} generates up to {most} tokens, and the model reads "
                f"{self.max_length} positions: there is no room for a prompt."
            )
        with self._counted(len(requests)):
            found: list[str] = super().generate_until(requests, disable_tqdm=True)
        return found

    @contextlib.contextmanager
    def _counted(self, requests: int) -> Iterator[None]:
        self._done, self._total = 0, requests
        self.progress(0, requests)
        yield
        self.progress(requests, requests)

    def _loglikelihood_tokens(self, requests: list[Any], *_: Any, **options: Any) -> list[Any]:
        # Windows of a document come one by one, each with a bar of its own.
        options["disable_tqdm"] = True
        found: list[Any] = super()._loglikelihood_tokens(requests, **options)
        return found

    def _model_call(self, inps: Tensor, *_: Any, **__: Any) -> Tensor:
        with self._in_the_loop(inps, None):
            logits: Tensor = super()._model_call(inps)
        return logits

    def _model_generate(self, context: Tensor, *inputs: Any, **options: Any) -> Tensor:
        if options.get("num_beams", 1) > 1:
            raise RetraceError("Beams are several continuations at once: decode without them.")
        with self._in_the_loop(context, context.shape[1]):
            tokens: Tensor = super()._model_generate(context, *inputs, **options)
        return tokens

    @contextlib.contextmanager
    def _in_the_loop(self, tokens: Tensor, prompt: int | None) -> Iterator[None]:
        """The model reads these tokens (1, positions), of which `prompt` precede decoding."""
        forget_lengths(self.model)
        if self.approximator is None:
            with torch.inference_mode():
                yield
        else:
            # What a method draws depends on the text alone, and not on what was asked before.
            number = zlib.crc32(tokens.cpu().numpy().tobytes())
            self.approximator.start([number], prompt)
            with (
                torch.inference_mode(),
                observed_attention(self.model, lambda call: None, self.approximator),
            ):
                yield
        self._done += 1
        self.progress(min(self._done, self._total), self._total)
