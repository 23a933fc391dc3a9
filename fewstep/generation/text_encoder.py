"""From prompts to what the UNet reads: weights of words, prompts in chunks, clip skip."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from cachetools import LRUCache, cachedmethod
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from fewstep.errors import InvalidRequest
from fewstep.generation.engines.graphs import Record, Recorded, owned
from fewstep.models.device import to_device
from fewstep.models.load import Diffusion
from fewstep.prompts import Part, is_plain

if TYPE_CHECKING:
    from compel import EmbeddingsProvider

# Of 75 tokens each for the real models: more than 2,000 characters of any language with an alphabet need.
MAX_CHUNKS = 8
# Of encoded prompts that are kept; one of SDXL's is 0.3 MB a chunk in 16 bits.
KEPT_BYTES = 64 * 10**6
# In channels. On a CPU, a second thread gains narrower text encoders nothing, and while other threads answer
# callers, each operator waits for it. The miniature's are of 96, SDXL's of 768 and 1280.
NARROW = 128


@dataclass(frozen=True)
class PromptEmbeds:
    """What the text encoders make of one prompt: states (1, T, D); of SDXL's second also pooled (1, P)."""

    states: Tensor
    pooled: Tensor | None

    @property
    def size(self) -> int:
        """What it takes of memory, in bytes."""
        return self.states.nbytes + (0 if self.pooled is None else self.pooled.nbytes)


class TextEncoder:
    """The text encoders of a pipeline and their tokenizers: SDXL has two, SD one."""

    def __init__(self, diffusion: Diffusion, device: torch.device | None = None) -> None:
        """`device` is where they compute, by default where they are now."""
        device = device or diffusion.text_encoder.device
        self._tokenizers = [diffusion.tokenizer]
        self._encoders = [_encoder(diffusion.text_encoder, device)]
        # SDXL was trained on the states before the last layer, without its norm.
        self._states = "LAST_HIDDEN_STATES_NORMALIZED"
        if isinstance(diffusion, StableDiffusionXLPipeline):
            self._tokenizers.append(diffusion.tokenizer_2)
            self._encoders.append(_encoder(diffusion.text_encoder_2, device))
            self._states = "PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED"
        for tokenizer in self._tokenizers:  # "will result in indexing errors", which chunks do not
            tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        # Two threads in one tokenizer are an error, and the model thread has the other. SDXL's two differ in
        # their padding only, which is not counted.
        self._counting_tokenizer = deepcopy(diffusion.tokenizer)
        self._counting = threading.Lock()
        self._kept = LRUCache[Hashable, PromptEmbeds](KEPT_BYTES, getsizeof=lambda prompt: prompt.size)

    def record(self, record: Record) -> None:
        """Have `record` make CUDA graphs of the encoders, for a plain prompt each."""

        def recorded(call: Callable[[Tensor, Tensor | None], Any]) -> Callable[[Tensor, Tensor | None], Any]:
            replayed = Recorded(call, record)

            def called(ids: Tensor, mask: Tensor | None) -> Any:
                if mask is not None:  # it would be looked through, which cannot be recorded
                    return call(ids, mask)
                replayed.turn += 1
                return owned(replayed(ids, None))  # a copy, since embeddings are kept

            return called

        self._encoders = [replace(encoder, call=recorded(encoder.call)) for encoder in self._encoders]

    def count_chunks(self, name: str, parts: tuple[Part, ...]) -> int:
        """How many times the text encoders' length a prompt fills, on any thread; at least 1.

        `name` is that of the input. Raises InvalidRequest for more than MAX_CHUNKS.
        """
        texts, weights = [part.text for part in parts], [part.weight for part in parts]
        length = self._counting_tokenizer.model_max_length
        with self._counting:
            if is_plain(parts) and len(self._counting_tokenizer("".join(texts)).input_ids) <= length:
                return 1  # as nearly all are
            counter = _provider(self._counting_tokenizer, None, self._states)
            ids, *_ = counter.get_token_ids_and_expand_weights(texts, weights, device="cpu")
        if (chunks := int(len(ids) // length)) > MAX_CHUNKS:
            limit = f"chunks of {length - 2} tokens; at most {MAX_CHUNKS} fit, so shorten it"
            raise InvalidRequest(f"{name} fills {chunks} {limit}")
        return chunks

    @cachedmethod(lambda self: self._kept)
    def encode(
        self, parts: tuple[Part, ...], chunks: int = 1, clip_skip: int = 0, weights: Hashable = ()
    ) -> PromptEmbeds:
        """A prompt that `count_chunks` took, padded to `chunks` with the empty prompt; kept for the next time
        that it is asked for by the same `weights` of the encoders.

        A plain prompt of one chunk is encoded as diffusers' `encode_prompt` does. Weights and chunks are
        compel's: a word's states are moved away from those of the empty prompt, or towards those of the
        prompt without it. What is pooled is of the first chunk and without weights.
        """
        parts = parts or (Part(""),)
        encoders = [replace(encoder, skip=clip_skip) for encoder in self._encoders]
        if chunks == 1 and is_plain(parts):
            return self._encode_plain(parts[0].text, encoders)
        states = []
        for tokenizer, encoder in zip(self._tokenizers, encoders, strict=True):
            # A new one each time: it keeps the empty prompt's states, which change with a style's weights.
            provider = _provider(tokenizer, encoder, self._states)
            weighted = provider.get_embeddings_for_weighted_prompt_fragments(
                [[part.text for part in parts]], [[part.weight for part in parts]], device=encoder.device
            )
            padding = [provider.empty_z] * (chunks - weighted.shape[1] // provider.max_token_count)
            states.append(torch.cat([weighted, *padding], dim=1))
        pooled = None
        if len(encoders) > 1:
            plain = " ".join(part.text for part in parts)
            pooled = provider.get_pooled_embeddings([plain], device=encoder.device)
        return PromptEmbeds(torch.cat(states, dim=-1), pooled)

    def _encode_plain(self, text: str, encoders: Sequence[_Encoder]) -> PromptEmbeds:
        outputs = []
        for tokenizer, encoder in zip(self._tokenizers, encoders, strict=True):
            tokens = tokenizer(text, padding="max_length", truncation=True, return_tensors="pt")
            outputs.append(encoder(to_device(tokens.input_ids, encoder.device)))
        if len(outputs) == 1:
            return PromptEmbeds(outputs[0].last_hidden_state, None)
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return PromptEmbeds(states, outputs[1].text_embeds)

    def encode_nothing(
        self, prompt: PromptEmbeds, chunks: int = 1, clip_skip: int = 0, weights: Hashable = ()
    ) -> PromptEmbeds:
        """No prompt at all: zeros for SDXL (`force_zeros_for_empty_prompt`), the empty text for SD."""
        if prompt.pooled is None:
            return self.encode((), chunks, clip_skip, weights)
        return PromptEmbeds(torch.zeros_like(prompt.states), torch.zeros_like(prompt.pooled))


@dataclass(frozen=True)
class _Encoder:
    """A text encoder as compel calls it, with the last `skip` layers left out but for what is pooled."""

    call: Callable[[Tensor, Tensor | None], Any]  # token ids (1, T) and a mask -> transformers' output
    norm: Any  # the model's last layer
    device: torch.device  # of the model, which looks through its layers when asked, as for its dtype
    dtype: torch.dtype
    threads: Callable[[], AbstractContextManager[None]]
    skip: int = 0

    def __call__(self, ids: Tensor, mask: Tensor | None = None, **_: Any) -> Any:
        with self.threads():
            output = self.call(ids, mask)
        if self.skip:
            kept = output.hidden_states[: -self.skip]
            output.hidden_states, output.last_hidden_state = kept, self.norm(kept[-1])
        return output


def _encoder(model: Any, device: torch.device) -> _Encoder:
    """The encoder that computes on `device`, wherever `model` is now."""
    norm = getattr(model, "text_model", model).final_layer_norm
    alone = device.type == "cpu" and model.config.hidden_size < NARROW
    call = partial(_encode, model)
    return _Encoder(call, norm, device, model.dtype, _one_thread if alone else nullcontext)


def _encode(model: Any, ids: Tensor, mask: Tensor | None) -> Any:
    return model(ids, mask, output_hidden_states=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within it, torch computes on the calling thread alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _provider(tokenizer: Any, encoder: _Encoder | None, states: str) -> EmbeddingsProvider:
    """compel's encoder of weighted and long prompts; `states` names a ReturnedEmbeddingsType."""
    from compel import EmbeddingsProvider, ReturnedEmbeddingsType, SplitLongTextMode  # takes a moment

    return EmbeddingsProvider(
        tokenizer,
        encoder,
        truncate=False,
        returned_embeddings_type=ReturnedEmbeddingsType[states],
        split_long_text_mode=SplitLongTextMode.SENTENCES,
        device=encoder.device if encoder else "cpu",
    )
