"""A prompt made richer by any OpenAI-compatible chat endpoint, through the official client."""

import logging

from fewstep.errors import EnhancerFailed
from fewstep.request import PROMPT_MAX_CHARS

logger = logging.getLogger(__name__)

TIMEOUT_S = 30
ASK = (
    "You improve prompts for a text-to-image model. Answer with one improved prompt and nothing else: keep "
    "the subject and every fact of the given one, add concrete detail of composition, light, material and "
    "style, in one paragraph of at most 60 words, in the language of the given one."
)


class PromptEnhancer:
    """Asks the chat endpoint at `url` (OpenAI's own without one) for better prompts."""

    def __init__(self, key: str, url: str | None, model: str) -> None:
        from openai import AsyncOpenAI  # takes most of a second to import

        self._client = AsyncOpenAI(api_key=key, base_url=url, timeout=TIMEOUT_S, max_retries=1)
        self._model = model

    async def improve(self, prompt: str) -> str:
        """Return a better prompt. Raises EnhancerFailed."""
        try:
            answer = await self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": "system", "content": ASK}, {"role": "user", "content": prompt}],
            )
            improved = (answer.choices[0].message.content or "").strip().strip('"').strip()
        # The client's own, and what an endpoint that is only nearly compatible causes.
        except Exception as error:
            logger.warning("the chat endpoint failed: %s", type(error).__name__)
            sentence = "the helper for prompts cannot be reached; your prompt is as it was"
            raise EnhancerFailed(sentence) from None
        if not improved:
            raise EnhancerFailed("the helper for prompts had nothing to say; your prompt is as it was")
        return improved[:PROMPT_MAX_CHARS]
