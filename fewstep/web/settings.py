"""What the environment decides of the front door; the Cog servers behind it have `fewstep.settings`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile

from fewstep.errors import SettingsError
from fewstep.settings import Settings

KEY_CHARS = 32


@dataclass(frozen=True)
class WebSettings:
    """Of one front door."""

    data: Path  # where images, the SQLite database and the cookies' key are
    database_url: str = field(default="", repr=False)  # may hold a password
    api_key: str = field(default="", repr=False)  # of /v1; none: open
    operator_key: str = field(default="", repr=False)  # of /operator; none: there is no such page
    chat_key: str = field(default="", repr=False)  # with it, prompts can be improved
    chat_url: str | None = None
    chat_model: str = "gpt-5-mini"
    replicate_token: str = field(default="", repr=False)
    queue_limit: int = 64
    per_visitor: int = 4
    deadline_s: float = 120.0
    styles: Path = field(default_factory=Path)  # of the operator, of this model

    @classmethod
    def from_env(cls, root: Path, environ: Mapping[str, str] | None = None) -> WebSettings:
        """Read `environ` (the process's own by default). Raises SettingsError."""
        environ = os.environ if environ is None else environ
        result = Settings.from_env(environ)
        return cls(
            data=Path(environ.get("FEWSTEP_WEB_DATA") or root / "data").absolute(),
            database_url=environ.get("DATABASE_URL", ""),
            api_key=environ.get("FEWSTEP_API_KEY", ""),
            operator_key=environ.get("FEWSTEP_OPERATOR_KEY", ""),
            chat_key=environ.get("OPENAI_API_KEY", ""),
            chat_url=environ.get("OPENAI_BASE_URL") or None,
            chat_model=environ.get("FEWSTEP_CHAT_MODEL") or cls.chat_model,
            replicate_token=environ.get("REPLICATE_API_TOKEN", ""),
            deadline_s=result.deadline_s,
            styles=result.styles_root / result.model,
        )

    def cookie_key(self) -> str:
        """What visitors' cookies are signed with: made once, and kept in the data folder."""
        self.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = self.data / "cookie-key"
        if not file.exists():
            with NamedTemporaryFile("w", dir=self.data) as new:  # which only we may read
                new.write(secrets.token_urlsafe(KEY_CHARS))
                new.flush()
                with suppress(FileExistsError):  # another was quicker
                    os.link(new.name, file)  # whole, or not at all
        key = file.read_text(encoding="utf-8")
        if len(key) < KEY_CHARS:
            raise SettingsError(
                "cookie-key in FEWSTEP_WEB_DATA is damaged; remove it, and visitors start anew"
            )
        return key

    def style_names(self) -> list[str]:
        """Of the operator's own style LoRAs, as predict() takes them."""
        if not self.styles.is_dir():
            return []
        return sorted(file.stem for file in self.styles.glob("*.safetensors"))
