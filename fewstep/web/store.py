"""What visitors leave: nicknames, kept images, reviews. SQLite in the data folder, or any DATABASE_URL.

Methods block for milliseconds: call them off the event loop, from as many threads as there are.
"""

from __future__ import annotations

import logging
import unicodedata
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import (
    JSON,
    CheckConstraint,
    DateTime,
    Engine,
    ForeignKey,
    String,
    create_engine,
    delete,
    event,
    func,
    select,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from fewstep.errors import FewstepError, InternalError, InvalidRequest, SettingsError

logger = logging.getLogger(__name__)

NICKNAME_MAX = 40
KEY_MAX = 4 * NICKNAME_MAX
BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # letters and symbols that are not seen
REVIEW_MAX = 1000
MAX_KEPT = 200  # images of one visitor
RATING = (1, 5)
PAGE = 24
READS = "fewstep_reads"  # a transaction that writes nothing


class Taken(FewstepError):
    """It is another's."""

    code = "taken"
    status = 409


class NotFound(FewstepError):
    """There is no such thing, or it is not this visitor's."""

    code = "not_found"
    status = 404


class Base(DeclarativeBase):
    """The tables."""


class Visitor(Base):
    """Whoever wrote something; known by a signed cookie alone."""

    __tablename__ = "visitors"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    nickname: Mapped[str] = mapped_column(String(NICKNAME_MAX), default="")
    # As it is compared: names that differ in case or composition alone are the same.
    nickname_key: Mapped[str | None] = mapped_column(String(KEY_MAX), unique=True)
    created: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class Image(Base):
    """A kept image; its file is named by the id."""

    __tablename__ = "pictures"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    visitor: Mapped[str] = mapped_column(ForeignKey("visitors.id", ondelete="CASCADE"), index=True)
    created: Mapped[datetime] = mapped_column(DateTime(timezone=True), index=True)
    width: Mapped[int]
    height: Mapped[int]
    recipe: Mapped[dict[str, Any]] = mapped_column(JSON)


class Review(Base):
    """A visitor's only one."""

    __tablename__ = "reviews"
    __table_args__ = (CheckConstraint("rating BETWEEN 1 AND 5"),)
    visitor: Mapped[str] = mapped_column(ForeignKey("visitors.id", ondelete="CASCADE"), primary_key=True)
    rating: Mapped[int]
    text: Mapped[str] = mapped_column(String(REVIEW_MAX))
    created: Mapped[datetime] = mapped_column(DateTime(timezone=True))


@dataclass(frozen=True, slots=True)
class Page:
    """Some of the gallery, newest first, and the id to go on from."""

    images: list[dict[str, Any]]
    next: str | None


class Store:
    """The database at `url`, and the files of the images below `folder`."""

    def __init__(self, folder: Path, url: str = "") -> None:
        """Raises SettingsError when either cannot be used."""
        self._files = folder / "pictures"
        try:
            self._files.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            raise SettingsError(
                "FEWSTEP_WEB_DATA names no folder that can be written; name another"
            ) from None
        url = url or f"sqlite:///{folder / 'fewstep.sqlite3'}"
        # As hosts write it; SQLAlchemy wants to know the driver.
        for short in ("postgres://", "postgresql://"):
            url = url.replace(short, "postgresql+psycopg://", 1) if url.startswith(short) else url
        try:
            self._engine = self._opened(url)
        except (SQLAlchemyError, ImportError) as error:
            logger.error("the database: %s", type(error).__name__)
            raise SettingsError(
                "DATABASE_URL names no database that can be used; check it, and that its server runs"
            ) from None
        self._writing = sessionmaker(self._engine)
        self._reading = sessionmaker(self._engine.execution_options(**{READS: True}))

    @staticmethod
    def _opened(url: str) -> Engine:
        engine = create_engine(url, pool_pre_ping=True, hide_parameters=True)  # which are what visitors wrote
        if engine.dialect.name == "sqlite":
            _let_sqlite_share(engine)
        Base.metadata.create_all(engine)
        return engine

    @contextmanager
    def _write(self, unless_unique: FewstepError | None = None) -> Iterator[Session]:
        """A transaction. Raises InternalError when it fails: what databases say quotes what was written."""
        with _failing_quietly(unless_unique), self._writing.begin() as session:
            yield session

    @contextmanager
    def _read(self) -> Iterator[Session]:
        with _failing_quietly(None), self._reading() as session:
            yield session

    def close(self) -> None:
        """Let go of the connections."""
        self._engine.dispose()

    def file(self, image: str) -> Path:
        """Where a kept image is. Raises NotFound for what is no id."""
        if len(image) != 32 or not set(image) <= set("0123456789abcdef"):
            raise NotFound("there is no such picture")
        return self._files / f"{image}.webp"

    def me(self, visitor: str) -> dict[str, Any]:
        """What is known of a visitor."""
        with self._read() as session:
            row, review = session.get(Visitor, visitor), session.get(Review, visitor)
            kept = session.scalar(select(func.count()).where(Image.visitor == visitor))
            return {
                "nickname": row.nickname if row else "",
                "pictures": kept,
                "review": {"rating": review.rating, "text": review.text} if review else None,
            }

    def name(self, visitor: str, nickname: object) -> None:
        """Give a visitor a display name; empty takes it away. Raises InvalidRequest or Taken."""
        shown = _text("nickname", nickname, NICKNAME_MAX)
        key = unicodedata.normalize("NFKC", shown).casefold() or None
        if key and len(key) > KEY_MAX:  # one character may stand for eighteen
            raise InvalidRequest("nickname is too long when it is written out; choose a shorter one")
        taken = Taken("this nickname is another visitor's; choose another")
        with self._write(taken) as session:
            row = _visitor(session, visitor)
            row.nickname, row.nickname_key = shown, key

    def keep(
        self, visitor: str, content: bytes, size: tuple[int, int], recipe: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Put an image into the gallery. Raises InvalidRequest when the visitor has kept enough."""
        image = uuid.uuid4().hex
        file = self.file(image)
        unfinished = file.with_suffix(".part")
        unfinished.write_bytes(content)
        unfinished.rename(file)
        try:
            with self._write() as session:
                owner = _visitor(session, visitor)
                kept = session.scalar(select(func.count()).where(Image.visitor == visitor)) or 0
                if kept >= MAX_KEPT:
                    raise InvalidRequest(f"{kept} of your pictures are kept, which is all; delete one first")
                row = Image(
                    id=image,
                    visitor=visitor,
                    created=_now(),
                    width=size[0],
                    height=size[1],
                    recipe=dict(recipe),
                )
                session.add(row)
                return _shown(row, owner.nickname, visitor)
        except BaseException:
            file.unlink(missing_ok=True)
            raise

    def gallery(self, visitor: str, before: str | None = None, limit: int = PAGE) -> Page:
        """What was kept, newest first, from behind the image `before`."""
        limit = max(1, min(limit, 100))
        if before:
            self.file(before)  # raises for what is no id
        chosen = select(Image, Visitor.nickname).join(Visitor, Visitor.id == Image.visitor)
        with self._read() as session:
            if before and (last := session.get(Image, before)):
                chosen = chosen.where(
                    (Image.created < last.created) | ((Image.created == last.created) & (Image.id < last.id))
                )
            ordered = chosen.order_by(Image.created.desc(), Image.id.desc()).limit(limit + 1)
            rows = session.execute(ordered).all()
            shown = [_shown(row, nickname, visitor) for row, nickname in rows[:limit]]
        return Page(shown, shown[-1]["id"] if len(rows) > limit else None)

    def discard(self, visitor: str, image: str) -> None:
        """Take one's own image out. Raises NotFound."""
        file = self.file(image)
        with self._write() as session:
            row = session.get(Image, image)
            if row is None or row.visitor != visitor:
                raise NotFound("there is no such picture of yours")
            session.delete(row)
        file.unlink(missing_ok=True)

    def review(self, visitor: str, rating: object, text: object) -> None:
        """Write one's review, or write it anew. Raises InvalidRequest."""
        low, high = RATING
        if isinstance(rating, bool) or not isinstance(rating, int) or not low <= rating <= high:
            raise InvalidRequest(f"rating must be a whole number from {low} to {high}")
        written = _text("text", text, REVIEW_MAX)
        with self._write() as session:
            _visitor(session, visitor)
            row = session.get(Review, visitor)
            if row is None:
                row = Review(visitor=visitor)
                session.add(row)
            row.rating, row.text, row.created = rating, written, _now()

    def reviews(self, visitor: str, limit: int = 100) -> dict[str, Any]:
        """The newest, with the average of all."""
        with self._read() as session:
            count, average = session.execute(select(func.count(), func.avg(Review.rating))).one()
            joined = select(Review, Visitor.nickname).join(Visitor, Visitor.id == Review.visitor)
            rows = session.execute(joined.order_by(Review.created.desc()).limit(limit)).all()
            shown = [
                {
                    "rating": row.rating,
                    "text": row.text,
                    "nickname": nickname,
                    "created": _written(row.created),
                    "mine": row.visitor == visitor,
                }
                for row, nickname in rows
            ]
        return {"reviews": shown, "count": count, "average": round(float(average), 2) if count else None}

    def forget(self, visitor: str) -> None:
        """Everything of a visitor's: rows and files."""
        with self._write() as session:
            session.get(Visitor, visitor, with_for_update=True)  # nothing is added meanwhile
            images = session.scalars(select(Image.id).where(Image.visitor == visitor)).all()
            for table in (Image, Review):
                session.execute(delete(table).where(table.visitor == visitor))
            session.execute(delete(Visitor).where(Visitor.id == visitor))
        for image in images:
            self.file(image).unlink(missing_ok=True)

    def summary(self) -> dict[str, Any]:
        """For the operator: how many there are of everything."""
        with self._read() as session:
            count, average = session.execute(select(func.count(), func.avg(Review.rating))).one()
            tables = {"visitors": Visitor, "pictures": Image}
            counts = {
                name: session.scalar(select(func.count()).select_from(table))
                for name, table in tables.items()
            }
        sizes = [file.stat().st_size for file in self._files.glob("*.webp")]
        average = round(float(average), 2) if count else None
        return {
            **counts,
            "reviews": count,
            "average_rating": average,
            "megabytes": round(sum(sizes) / 1e6, 1),
        }


@contextmanager
def _failing_quietly(unless_unique: FewstepError | None) -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        if unless_unique and isinstance(error, IntegrityError):
            raise unless_unique from None
        logger.error("the database failed: %s", type(error).__name__)
        raise InternalError() from None


def _let_sqlite_share(engine: Any) -> None:
    """Writers wait for one another instead of failing, and readers wait for nobody (WAL)."""

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _: object) -> None:
        connection.isolation_level = None  # so that BEGIN is ours
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=10000", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def began(connection: Any) -> None:
        # A transaction that reads first and then writes fails at once if another wrote meanwhile.
        reads = connection.get_execution_options().get(READS)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _visitor(session: Session, visitor: str) -> Visitor:
    """The row, made if need be, and held until the end: of one visitor, one writes at a time."""
    while True:
        if row := session.get(Visitor, visitor, with_for_update=True):
            return row
        try:
            with session.begin_nested():
                session.add(Visitor(id=visitor, nickname="", created=_now()))
        except IntegrityError:  # another made it just now, and may have taken it away again
            pass


def _text(name: str, value: object, most: int) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} must be text")
    text = unicodedata.normalize("NFC", value).strip()
    if len(text) > most:
        raise InvalidRequest(f"{name} has {len(text)} characters; at most {most} are allowed")
    # Controls, half surrogates, and what turns the direction of the text around it; joined emoji may be in
    # a text, while a name with an invisible character looks like another's.
    kept = "\n\u200d" if name == "text" else ""
    unseen = ("Cc", "Cf", "Cs", "Co")
    if any((unicodedata.category(one) in unseen or one in BLANK) and one not in kept for one in text):
        raise InvalidRequest(f"{name} holds characters that cannot be seen; leave them out")
    return text


def _shown(row: Image, nickname: str, visitor: str) -> dict[str, Any]:
    return {
        "id": row.id,
        "url": f"/pictures/{row.id}.webp",
        "width": row.width,
        "height": row.height,
        "recipe": row.recipe,
        "nickname": nickname,
        "created": _written(row.created),
        "mine": row.visitor == visitor,
    }


def _now() -> datetime:
    return datetime.now(UTC)


def _written(moment: datetime) -> str:
    # SQLite gives it back without the zone that it was given with.
    return moment.replace(tzinfo=moment.tzinfo or UTC).isoformat(timespec="seconds")
