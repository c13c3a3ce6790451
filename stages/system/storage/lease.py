"""Which claims on locations this machine holds, and that nothing is sent where another machine has taken one over.

A machine that was cut off for long does not know what happened meanwhile. So each claim has a number of its own, is
renewed only in the place of what was stored last, and is renewed before what lies in its folder is sent.
"""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from stages.system.ownership import is_alive, process_token
from stages.system.refusal import Refused
from stages.system.storage.locations import Location, location_of, shown_here
from stages.system.storage.object_store import ObjectStore
from stages.system.storage.sync_state import open_state

RENEW_TRIES = 3
TABLE = "CREATE TABLE IF NOT EXISTS claims (path TEXT PRIMARY KEY, number TEXT, owner TEXT, loss TEXT, renewed REAL)"
LEASE_SECONDS = 20.0
"""A claim that was renewed is not taken over for far longer."""

_losses: dict[Path, str] = {}
"""Claims that this process lost, by their paths here -> the line that says so."""


def field_of(content: bytes | None, name: str) -> str:
    """A field of a claim's content; empty where it has none, or is no claim."""
    with suppress(ValueError, AttributeError):
        return str(json.loads(content or b"").get(name) or "")
    return ""


def host_of(content: bytes | None) -> str:
    """The host of a claim's owner."""
    return field_of(content, "host") or "another machine"


def renew(store: ObjectStore, location: Location, number: str) -> str | None:
    """Store a claim of this number again; returns None, or the host that has it where it is another one by now."""
    for _ in range(RENEW_TRIES):
        stored, content = store.info(location), store.read(location)
        if content is None or field_of(content, "claim") != number:
            return host_of(content)
        claim: dict[str, Any] = json.loads(content)
        renewed = json.dumps({**claim, "renewals": int(claim.get("renewals", 0)) + 1}).encode()
        if stored is not None and store.replace(location, renewed, stored):
            return None
    content = store.read(location)  # other threads renewed it
    return None if field_of(content, "claim") == number else host_of(content)


def note_claim(path: Path, number: str, since: float) -> None:
    """Remember that this process holds the claim whose path here this is, and stored it after `since` (monotonic)."""
    _losses.pop(path, None)
    _write(path, number, None, since)


def forget_claim(path: Path) -> None:
    """Forget a claim that is about to be released."""
    with open_state(TABLE) as database:
        database.execute("DELETE FROM claims WHERE path = ?", [str(path)])


def note_loss(path: Path, number: str, host: str) -> str:
    """Remember that `host` took over a claim of this process; returns the line that says so."""
    loss = _losses[path] = _loss_line(path, host)
    _write(path, number, loss, 0.0)
    return loss


def loss_of(folder: Path) -> str | None:
    """The line that tells of a lost claim of this process on a folder, or on one that holds it; None without one."""
    return next((loss for path, loss in _losses.items() if folder.is_relative_to(claimed_folder(path))), None)


def refuse_loss(folder: Path) -> None:
    """Raise `Refused` with the line of `loss_of`, if there is one."""
    if (loss := loss_of(folder)) is not None:
        raise Refused(loss)


def confirm_claims(folder: Path, store: ObjectStore) -> None:
    """Raise `Refused` where another machine took over a claim of this one that is about a part of the folder.

    Claims of living processes are renewed when that is due.
    """
    with open_state(TABLE) as database:
        claims = database.execute("SELECT path, number, owner, loss, renewed FROM claims").fetchall()
    for text, number, owner, loss, renewed in claims:
        path = Path(text)
        claimed, location, now = claimed_folder(path), location_of(path), time.monotonic()
        if location is None or not (claimed.is_relative_to(folder) or folder.is_relative_to(claimed)):
            continue
        if loss is None:
            content = store.read(location)
            is_here = field_of(content, "claim") == number or is_alive(field_of(content, "owner"))
            host = None if is_here else host_of(content)
            # A process that is dead must not keep its claim. The clock is one for all processes since the last boot.
            if host is None and is_alive(owner) and not 0 <= now - renewed < LEASE_SECONDS:
                host = renew(store, location, number)
                if host is None:
                    _update(path, number, "renewed", now)
            if host is not None and _update(path, number, "loss", line := _loss_line(path, host)):
                loss = line
                if owner == process_token():
                    _losses[path] = line
        if loss is not None:
            raise Refused(loss)


def forget_ended(folder: Path) -> None:
    """Forget the claims of dead processes in a folder that holds again what its location holds."""
    with open_state(TABLE) as database:
        for text, owner in database.execute("SELECT path, owner FROM claims").fetchall():
            if Path(text).is_relative_to(folder) and not is_alive(owner):
                database.execute("DELETE FROM claims WHERE path = ?", [text])


def claimed_folder(path: Path) -> Path:
    """The folder that a claim is about: it lies there, or in a hidden folder of it."""
    return path.parent.parent if path.parent.name.startswith(".") else path.parent


def _loss_line(path: Path, host: str) -> str:
    folder = claimed_folder(path)
    return (
        f"{location_of(folder)}: {host} works here by now, as nothing was known of this process for too long - nothing "
        f"more is sent there; what was made since is in {shown_here(folder)}; start again when the other one is done"
    )


def _write(path: Path, number: str, loss: str | None, renewed: float) -> None:
    with open_state(TABLE) as database:
        row = [str(path), number, process_token(), loss, renewed]
        database.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?, ?)", row)


def _update(path: Path, number: str, column: str, value: str | float) -> bool:
    """Change the row of a claim; False where it was released, and perhaps made again, meanwhile."""
    with open_state(TABLE) as database:
        change = f"UPDATE claims SET {column} = ? WHERE path = ? AND number = ?"
        return database.execute(change, [value, str(path), number]).rowcount > 0
