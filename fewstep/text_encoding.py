"""From prompts to what the UNet reads: weights of words, prompts in chunks, clip skip."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from compel import EmbeddingsProvider, ReturnedEmbeddingsType, SplitLongTextMode
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from fewstep.errors import InvalidRequest
from fewstep.prompts import Part, is_plain, parse_prompt

Diffusion: TypeAlias = StableDiffusionXLPipeline | StableDiffusionPipeline

# Of 75 tokens each for the real models: more than 2,000 characters of any language with an alphabet need.
MAX_CHUNKS = 8
# Of encoded prompts that are kept; one of SDXL's is 0.3 MB a chunk in 16 bits.
KEPT_BYTES = 64 * 10**6


@dataclass(frozen=True)
class Prompt:
    """What the text encoders make of one prompt: states (1, T, D); of SDXL's second also pooled (1, P)."""

    states: Tensor
    pooled: Tensor | None

    @property
    def size(self) -> int:
        """What it takes of memory, in bytes."""
        return self.states.nbytes + (0 if self.pooled is None else self.pooled.nbytes)


class TextEncoding:
    """The text encoders of a pipeline and their tokenizers: SDXL has two, SD one."""

    def __init__(self, diffusion: Diffusion) -> None:
        self.diffusion = diffusion
        self._tokenizers = [diffusion.tokenizer]
        self._encoders = [diffusion.text_encoder]
        # SDXL was trained on the states before the last layer, without its norm.
        self._states = ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED
        if isinstance(diffusion, StableDiffusionXLPipeline):
            self._tokenizers.append(diffusion.tokenizer_2)
            self._encoders.append(diffusion.text_encoder_2)
            self._states = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
        for tokenizer in self._tokenizers:  # "will result in indexing errors", which chunks do not
            tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        # Two threads in one tokenizer are an error, and the model thread has the other. SDXL's two differ in
        # their padding only, which is not counted.
        self._counter = _provider(deepcopy(diffusion.tokenizer), None, self._states)
        self._counting = threading.Lock()
        self._kept: OrderedDict[Hashable, Prompt] = OrderedDict()

    def count_chunks(self, name: str, text: str) -> int:
        """How many times the text encoders' length a prompt fills, on any thread; at least 1.

        `name` is that of the input. Raises InvalidRequest for more than MAX_CHUNKS.
        """
        parts = parse_prompt(name, text)
        texts, weights = [part.text for part in parts], [part.weight for part in parts]
        with self._counting:
            ids, *_ = self._counter.get_token_ids_and_expand_weights(texts, weights, device="cpu")
        length = self._counter.max_token_count
        found = int(len(ids) // length)
        if found > MAX_CHUNKS:
            raise InvalidRequest(
                f"{name} fills {found} chunks of {length - 2} tokens; at most {MAX_CHUNKS} fit, so shorten it"
            )
        return found

    def encode(self, text: str, chunks: int = 1, clip_skip: int = 0, weights: Hashable = ()) -> Prompt:
        """A prompt as `_encode` makes it, or as it was made before by the same `weights` of the encoders."""
        key = (text, chunks, clip_skip, weights)
        if key not in self._kept:
            self._kept[key] = self._encode(text, chunks, clip_skip)
            total = sum(prompt.size for prompt in self._kept.values())
            while total > KEPT_BYTES and len(self._kept) > 1:
                total -= self._kept.popitem(last=False)[1].size
        self._kept.move_to_end(key)
        return self._kept[key]

    def _encode(self, text: str, chunks: int, clip_skip: int) -> Prompt:
        """A prompt that `parse_prompt` and `count_chunks` took, padded to `chunks` with the empty prompt.

        A plain prompt of one chunk is encoded by diffusers. Weights and chunks are compel's: a word's states
        are moved away from those of the empty prompt, or towards those of the prompt without it. What is
        pooled is of the first chunk and without weights.
        """
        parts = parse_prompt("prompt", text) or (Part(""),)
        if chunks == 1 and not clip_skip and is_plain(parts):
            states, _, *pooled = self.diffusion.encode_prompt(
                "".join(part.text for part in parts),
                device=self._encoders[0].device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )
            return Prompt(states, pooled[0] if pooled else None)
        found = []
        for tokenizer, encoder in zip(self._tokenizers, self._encoders, strict=True):
            # A new one each time: it keeps the empty prompt's states, which change with a style's weights.
            provider = _provider(tokenizer, _Encoder(encoder, clip_skip), self._states)
            states = provider.get_embeddings_for_weighted_prompt_fragments(
                [[part.text for part in parts]], [[part.weight for part in parts]], device=encoder.device
            )
            padding = [provider.empty_z] * (chunks - states.shape[1] // provider.max_token_count)
            found.append(torch.cat([states, *padding], dim=1))
        pooled = None
        if len(self._encoders) > 1:
            plain = " ".join(part.text for part in parts)
            pooled = provider.get_pooled_embeddings([plain], device=encoder.device)
        return Prompt(torch.cat(found, dim=-1), pooled)

    def nothing(self, prompt: Prompt, chunks: int = 1, clip_skip: int = 0, weights: Hashable = ()) -> Prompt:
        """No prompt at all: zeros for SDXL (`force_zeros_for_empty_prompt`), the empty text for SD."""
        if prompt.pooled is None:
            return self.encode("", chunks, clip_skip, weights)
        return Prompt(torch.zeros_like(prompt.states), torch.zeros_like(prompt.pooled))


class _Encoder:
    """A text encoder as compel calls it, with the last `skip` layers left out but for what is pooled."""

    def __init__(self, encoder: Any, skip: int) -> None:
        self.device, self.dtype = encoder.device, encoder.dtype
        self._encoder = encoder
        self._skip = skip

    def __call__(self, ids: Tensor, mask: Tensor | None = None, **_: Any) -> Any:
        output = self._encoder(ids, mask, output_hidden_states=True)
        if self._skip:
            kept = output.hidden_states[: -self._skip]
            norm = getattr(self._encoder, "text_model", self._encoder).final_layer_norm
            output.hidden_states, output.last_hidden_state = kept, norm(kept[-1])
        return output


def _provider(tokenizer: Any, encoder: _Encoder | None, states: ReturnedEmbeddingsType) -> EmbeddingsProvider:
    return EmbeddingsProvider(
        tokenizer,
        encoder,
        truncate=False,
        returned_embeddings_type=states,
        split_long_text_mode=SplitLongTextMode.SENTENCES,
        device=encoder.device if encoder else "cpu",
    )
