"""A prompt made richer by any OpenAI-compatible chat endpoint, through the official client."""

from __future__ import annotations

import logging

from fewstep.errors import FewstepError, InvalidRequest
from fewstep.request import PROMPT_MAX_CHARS

logger = logging.getLogger(__name__)

TIMEOUT_S = 30
ASK = (
    "You improve prompts for a text-to-image model. Answer with one improved prompt and nothing else: keep "
    "the subject and every fact of the given one, add concrete detail of composition, light, material and "
    "style, in one paragraph of at most 60 words, in the language of the given one."
)


class HelpFailed(FewstepError):
    """The chat endpoint did not answer as it should."""

    code = "help_failed"
    status = 502


class PromptEnhancer:
    """`improve` asks the endpoint at `url` (OpenAI's own without one) for a better prompt."""

    def __init__(self, key: str, url: str | None, model: str) -> None:
        from openai import AsyncOpenAI  # takes most of a second to import

        self._client = AsyncOpenAI(api_key=key, base_url=url, timeout=TIMEOUT_S, max_retries=1)
        self._model = model

    async def improve(self, prompt: object) -> str:
        """Raises InvalidRequest, or HelpFailed."""
        if not isinstance(prompt, str) or not prompt.strip() or len(prompt) > PROMPT_MAX_CHARS:
            raise InvalidRequest(f"prompt must be text of 1 to {PROMPT_MAX_CHARS} characters")
        try:
            answer = await self._client.chat.completions.create(
                model=self._model,
                messages=[{"role": "system", "content": ASK}, {"role": "user", "content": prompt}],
            )
            improved = (answer.choices[0].message.content or "").strip().strip('"').strip()
        except (
            Exception
        ) as error:  # the client's own, and what an endpoint that is only nearly compatible causes
            logger.warning("the chat endpoint failed: %s", type(error).__name__)
            raise HelpFailed("the helper for prompts cannot be reached; your prompt is as it was") from None
        if not improved:
            raise HelpFailed("the helper for prompts had nothing to say; your prompt is as it was")
        return improved[:PROMPT_MAX_CHARS]
