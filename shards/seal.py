"""A text that carries its own sha256 in its last line, so that no bit of it changes unseen."""

import hashlib
import re

TAIL = re.compile(rb'"sha256": "([0-9a-f]{64})"\n}\n')
TAIL_BYTES = len('"sha256": ""\n}\n') + 64


def sealed(body: str) -> str:
    """`body`, an open JSON object, closed by the sha256 of everything before it."""
    return f'{body}"sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def unsealed(content: bytes) -> str | None:
    """What is wrong with a sealed text, if anything is."""
    body, tail = content[:-TAIL_BYTES], TAIL.fullmatch(content[-TAIL_BYTES:])
    if not tail:
        return f"has no sha256 in its last line, at byte {max(0, len(content) - TAIL_BYTES)}"
    found = hashlib.sha256(body).hexdigest()
    said = tail[1].decode()
    return (
        None if found == said else f"sha256 of its first {len(body)} bytes is {found[:12]}..., it says {said[:12]}..."
    )
