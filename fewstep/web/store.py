"""What users leave: nicknames, kept images, reviews. SQLite in the data folder, or any DATABASE_URL.

Methods block for milliseconds: call them off the event loop, from as many threads as there are.
"""

import logging
import re
import unicodedata
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from fewstep.errors import FewstepError, InternalError, InvalidRequest, NotFound, SettingsError, Taken
from fewstep.web.messages import NICKNAME_MAX, RATING, REVIEW_MAX

logger = logging.getLogger(__name__)

KEY_MAX = 4 * NICKNAME_MAX
MAX_KEPT = 200  # images of one user
PAGE = 24  # images, by default
REVIEWS = 100
READS = "fewstep_reads"  # a transaction that writes nothing


class Base(DeclarativeBase):
    """The tables."""

    type_annotation_map = {datetime: sa.DateTime(timezone=True)}


class User(Base):
    """Whoever wrote something; known by a signed cookie alone."""

    __tablename__ = "visitors"
    id: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    nickname: Mapped[str] = mapped_column(sa.String(NICKNAME_MAX), default="")
    # As it is compared: names that differ in case or composition alone are the same.
    nickname_key: Mapped[str | None] = mapped_column(sa.String(KEY_MAX), unique=True)
    created: Mapped[datetime]


class Image(Base):
    """A kept image; its file is named by the id."""

    __tablename__ = "pictures"
    id: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    user: Mapped[str] = mapped_column("visitor", sa.ForeignKey("visitors.id", ondelete="CASCADE"), index=True)
    created: Mapped[datetime] = mapped_column(index=True)
    width: Mapped[int]
    height: Mapped[int]
    recipe: Mapped[dict[str, Any]] = mapped_column(sa.JSON)
    owner: Mapped[User] = relationship(lazy="joined", innerjoin=True)

    def shown(self, user: str) -> dict[str, Any]:
        """Return what `user` sees of it."""
        return {
            "id": self.id,
            "url": f"/pictures/{self.id}.webp",
            "width": self.width,
            "height": self.height,
            "recipe": self.recipe,
            **_attribution(self, user),
        }


class Review(Base):
    """A user's only one."""

    __tablename__ = "reviews"
    __table_args__ = (sa.CheckConstraint(f"rating BETWEEN {RATING[0]} AND {RATING[1]}"),)
    user: Mapped[str] = mapped_column(
        "visitor", sa.ForeignKey("visitors.id", ondelete="CASCADE"), primary_key=True
    )
    rating: Mapped[int]
    text: Mapped[str] = mapped_column(sa.String(REVIEW_MAX))
    created: Mapped[datetime]
    owner: Mapped[User] = relationship(lazy="joined", innerjoin=True)


class Store:
    """The database at `url`, and the files of the images below `folder`."""

    def __init__(self, folder: Path, url: str = "") -> None:
        """Raises SettingsError when either cannot be used."""
        self._files = folder / "pictures"
        try:
            self._files.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            sentence = "FEWSTEP_WEB_DATA names no folder that can be written; name another"
            raise SettingsError(sentence) from None
        url = url or f"sqlite:///{folder / 'fewstep.sqlite3'}"
        # As hosts write it; SQLAlchemy wants to know the driver.
        url = re.sub("^postgres(ql)?://", "postgresql+psycopg://", url)
        try:
            # Parameters, which are what users wrote, are in no message.
            self._engine = sa.create_engine(url, pool_pre_ping=True, hide_parameters=True)
            if self._engine.dialect.name == "sqlite":
                _let_sqlite_share(self._engine)
            Base.metadata.create_all(self._engine)
        except (SQLAlchemyError, ImportError) as error:
            logger.error("the database: %s", type(error).__name__)
            sentence = "DATABASE_URL names no database that can be used; check it, and that its server runs"
            raise SettingsError(sentence) from None

    @contextmanager
    def _transaction(
        self, *, reads: bool = False, unless_unique: FewstepError | None = None
    ) -> Iterator[Session]:
        """Begin one that `reads` and writes nothing, or that may write.

        Raises `unless_unique` for what is another's, and else InternalError: what databases say quotes what
        was written.
        """
        try:
            engine = self._engine.execution_options(**{READS: reads})
            with Session(engine) as session, session.begin():
                yield session
        except SQLAlchemyError as error:
            if unless_unique and isinstance(error, IntegrityError):
                raise unless_unique from None
            logger.error("the database failed: %s", type(error).__name__)
            raise InternalError() from None

    def close(self) -> None:
        """Let go of the connections."""
        self._engine.dispose()

    def file(self, image: str) -> Path:
        """Return where a kept image is. Raises NotFound for what is no id."""
        if len(image) != 32 or not set(image) <= set("0123456789abcdef"):
            raise NotFound("there is no such picture")
        return self._files / f"{image}.webp"

    def me(self, user: str) -> dict[str, Any]:
        """Return what is known of a user."""
        with self._transaction(reads=True) as session:
            row, review = session.get(User, user), session.get(Review, user)
            kept = session.scalar(sa.select(sa.func.count()).where(Image.user == user))
            return {
                "nickname": row.nickname if row else "",
                "pictures": kept,
                "review": {"rating": review.rating, "text": review.text} if review else None,
            }

    def name(self, user: str, nickname: str) -> None:
        """Give a user a display name; empty takes it away. Raises InvalidRequest or Taken."""
        key = unicodedata.normalize("NFKC", nickname).casefold() or None
        if key and len(key) > KEY_MAX:  # one character may stand for eighteen
            raise InvalidRequest("nickname is too long when it is written out; choose a shorter one")
        taken = Taken("this nickname is another visitor's; choose another")
        with self._transaction(unless_unique=taken) as session:
            row = _user(session, user)
            row.nickname, row.nickname_key = nickname, key

    def keep(self, user: str, content: bytes, recipe: dict[str, Any]) -> dict[str, Any]:
        """Put an image of `recipe` into the gallery. Raises InvalidRequest when the user has kept enough."""
        image = uuid.uuid4().hex
        file = self.file(image)
        unfinished = file.with_suffix(".part")
        unfinished.write_bytes(content)
        unfinished.rename(file)
        try:
            with self._transaction() as session:
                owner = _user(session, user)
                kept = session.scalar(sa.select(sa.func.count()).where(Image.user == user)) or 0
                if kept >= MAX_KEPT:
                    raise InvalidRequest(f"{kept} of your pictures are kept, which is all; delete one first")
                size = {side: recipe[side] for side in ("width", "height")}
                row = Image(id=image, user=user, owner=owner, created=_now(), recipe=recipe, **size)
                session.add(row)
                return row.shown(user)
        except BaseException:
            file.unlink(missing_ok=True)
            raise

    def gallery(self, user: str, before: str | None = None, limit: int = PAGE) -> dict[str, Any]:
        """Return what was kept, newest first, from behind the image `before`, and the id to go on from."""
        limit = max(1, min(limit, 100))
        if before:
            self.file(before)  # raises for what is no id
        newest = sa.select(Image).order_by(Image.created.desc(), Image.id.desc()).limit(limit + 1)
        with self._transaction(reads=True) as session:
            if before and (last := session.get(Image, before)):
                newest = newest.where(sa.tuple_(Image.created, Image.id) < (last.created, last.id))
            rows = session.scalars(newest).all()
            shown = [row.shown(user) for row in rows[:limit]]
        return {"pictures": shown, "next": shown[-1]["id"] if len(rows) > limit else None}

    def discard(self, user: str, image: str) -> None:
        """Take a user's own image out. Raises NotFound."""
        file = self.file(image)
        with self._transaction() as session:
            row = session.get(Image, image)
            if row is None or row.user != user:
                raise NotFound("there is no such picture of yours")
            session.delete(row)
        file.unlink(missing_ok=True)

    def review(self, user: str, rating: int, text: str) -> None:
        """Write a user's review, or write it anew."""
        with self._transaction() as session:
            _user(session, user)
            session.merge(Review(user=user, rating=rating, text=text, created=_now()))

    def reviews(self, user: str) -> dict[str, Any]:
        """Return the newest, with the average of all."""
        with self._transaction(reads=True) as session:
            count, average = _rating(session)
            rows = session.scalars(sa.select(Review).order_by(Review.created.desc()).limit(REVIEWS))
            shown = [{"rating": row.rating, "text": row.text, **_attribution(row, user)} for row in rows]
        return {"reviews": shown, "count": count, "average": average}

    def forget(self, user: str) -> None:
        """Remove everything of a user's: rows and files."""
        with self._transaction() as session:
            _user(session, user)  # so that nothing is added meanwhile
            images = session.scalars(sa.select(Image.id).where(Image.user == user)).all()
            session.execute(sa.delete(User).where(User.id == user))  # and with it what refers to it
        for image in images:
            self.file(image).unlink(missing_ok=True)

    def summary(self) -> dict[str, Any]:
        """Count everything, for the operator."""
        with self._transaction(reads=True) as session:
            count, average = _rating(session)
            users = session.scalar(sa.select(sa.func.count(User.id)))
            images = session.scalar(sa.select(sa.func.count(Image.id)))
        sizes = [file.stat().st_size for file in self._files.glob("*.webp")]
        return {
            "visitors": users,
            "pictures": images,
            "reviews": count,
            "average_rating": average,
            "megabytes": round(sum(sizes) / 1e6, 1),
        }


def _let_sqlite_share(engine: Any) -> None:
    """Writers wait for one another instead of failing, and readers wait for nobody (WAL)."""

    @sa.event.listens_for(engine, "connect")
    def connected(connection: Any, _: object) -> None:
        connection.isolation_level = None  # so that BEGIN is ours
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=10000", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def began(connection: Any) -> None:
        # A transaction that reads first and then writes fails at once if another wrote meanwhile.
        reads = connection.get_execution_options().get(READS)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _user(session: Session, user: str) -> User:
    """Return the row, made if need be, and held until the end: of one user, one writes at a time."""
    while True:
        if row := session.get(User, user, with_for_update=True):
            return row
        try:
            with session.begin_nested():
                session.add(User(id=user, nickname="", created=_now()))
        except IntegrityError:  # another made it just now, and may have taken it away again
            pass


def _rating(session: Session) -> tuple[int, float | None]:
    count, average = session.execute(sa.select(sa.func.count(), sa.func.avg(Review.rating))).one()
    return count, round(float(average), 2) if count else None


def _attribution(row: Image | Review, user: str) -> dict[str, Any]:
    # SQLite gives it back without the zone that it was given with.
    created = row.created.replace(tzinfo=row.created.tzinfo or UTC)
    return {
        "nickname": row.owner.nickname,
        "created": created.isoformat(timespec="seconds"),
        "mine": row.user == user,
    }


def _now() -> datetime:
    return datetime.now(UTC)
