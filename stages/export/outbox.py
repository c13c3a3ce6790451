"""The parcels that wait for the hub, between the thread that trains and the one that sends."""

import threading

from stages.export.parcel import Parcel


class Outbox:
    """In order of arrival; a checkpoint that waits makes room for a newer one, so a slow link does not pile them up."""

    def __init__(self) -> None:
        self._waiting: list[Parcel] = []
        self._taken: Parcel | None = None
        self._closing = False
        self._news = threading.Condition()

    def add(self, parcel: Parcel) -> None:
        """Put a parcel in, and drop the checkpoint that it supersedes."""
        with self._news:
            for older in [other for other in self._waiting if other.samples is not None and parcel.samples is not None]:
                self._waiting.remove(older)
                older.drop()
            self._waiting.append(parcel)
            self._news.notify()

    def take(self) -> Parcel | None:
        """Wait for a parcel; None when there is none and none will come."""
        with self._news:
            self._news.wait_for(lambda: self._waiting or self._closing)
            self._taken = self._waiting.pop(0) if self._waiting else None
            return self._taken

    def done(self) -> None:
        """Drop the parcel that was taken: it arrived, or never can."""
        with self._news:
            if self._taken is not None:
                self._taken.drop()
            self._taken = None

    def put_back(self) -> None:
        """Put the parcel that was taken behind the others, which may fare better; dropped when superseded meanwhile."""
        with self._news:
            parcel, self._taken = self._taken, None
            if parcel is None:
                return
            superseded = parcel.samples is not None and any(other.samples is not None for other in self._waiting)
            if superseded:
                parcel.drop()
            else:
                self._waiting.append(parcel)

    def close(self) -> None:
        """Let `take` come to an end when all is taken."""
        with self._news:
            self._closing = True
            self._news.notify()

    def give_up(self) -> list[str]:
        """Close, forget what waits, and say the names of all that did not arrive.

        The one on its way ends by itself once its snapshot is gone.
        """
        with self._news:
            left = self.left()
            self._waiting, self._closing = [], True
            self._news.notify()
            return left

    def left(self) -> list[str]:
        """Names of what did not arrive yet, the one on its way first."""
        with self._news:
            return [parcel.name for parcel in ([self._taken] if self._taken else []) + self._waiting]
