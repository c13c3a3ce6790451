"""Whole objects of S3 by obstore, which is faster than s3fs, with the credentials, address and region of s3fs.

It only ever adds successes: an object that it cannot fetch is fetched by s3fs, whose errors are the ones that count.
"""

import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from stages.system.refusal import in_one_line
from stages.system.storage.locations import Location

CHUNK_BYTES = 8 << 20
SECONDS = "60s"
"""Until a connection is made, and between two pieces of an answer; those of botocore."""
MAX_FAILURES = 5
"""In a row, of objects that s3fs then fetched."""
SHARED_SETTINGS = {"endpoint_url"}
"""Settings of fsspec for s3 that mean the same here; with any other s3fs does all."""
CERTIFICATE_VARIABLES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE")


@dataclass(frozen=True)
class Fetched:
    """What came with an object."""

    size: int
    etag: str
    modified: float


class ObstoreReader:
    """Fetches objects with the settings of an s3fs file system."""

    _process: ClassVar[int | None] = None
    """The one that has obstore's threads: they do not survive a fork."""

    def __init__(self, files: Any) -> None:
        self._files = files
        self._failures = 0

    @classmethod
    def of(cls, files: Any) -> "ObstoreReader | None":
        """One beside an s3fs file system; None without the package, in a fork, and with settings it does not share."""
        import fsspec

        settings = set(fsspec.config.conf.get("s3", {})) - SHARED_SETTINGS
        if settings or files.anon or cls._process not in (None, os.getpid()):
            return None
        try:
            import obstore  # noqa: F401
        except ImportError:
            return None
        cls._process = os.getpid()
        return cls(files)

    def fetch(self, location: Location, target: Path) -> Fetched | None:
        """Write an object into a file; None where s3fs is to do it. Raises what obstore raises."""
        if self._failures >= MAX_FAILURES or (store := self._store(location.bucket)) is None:
            return None
        import obstore

        answer = obstore.get(store, location.key.partition("/")[2])
        meta = answer.meta
        with open(target, "wb") as file:
            file.writelines(answer.stream(min_chunk_size=CHUNK_BYTES))
        self._failures = 0
        return Fetched(meta["size"], (meta["e_tag"] or "").strip('"'), meta["last_modified"].timestamp())

    def count_failure(self, location: Location, error: Exception) -> None:
        """An object that s3fs fetched, and obstore did not; after some in a row a line says that it is left alone."""
        self._failures += 1
        if self._failures == MAX_FAILURES:
            print(
                f"storage: {location}: obstore cannot fetch what s3fs can ({in_one_line(error)}), so s3fs does it from "
                "here on, slower - set AWS_DEFAULT_REGION to the bucket's, or uninstall obstore",
                file=sys.stderr,
                flush=True,
            )

    def _store(self, bucket: str) -> Any:
        from fsspec.asyn import sync

        client = self._files.s3  # connects at first
        config = client.meta.config
        credentials = client._request_signer._credentials
        address: str = client.meta.endpoint_url
        # obstore would trust the system's certificates beside those.
        has_certificates = address.startswith("https:") and any(map(os.environ.get, CERTIFICATE_VARIABLES))
        if config.s3 or config.proxies or credentials is None or has_certificates:
            return None
        keys = sync(self._files.loop, credentials.get_frozen_credentials)  # renews those of a role
        region = client.meta.region_name
        region = region if region and region != "aws-global" else "us-east-1"
        return _open_store(bucket, address, region, keys.access_key, keys.secret_key, keys.token)


@lru_cache(maxsize=16)
def _open_store(bucket: str, address: str, region: str, key: str, secret: str, token: str | None) -> Any:
    from obstore.store import S3Store

    return S3Store(
        bucket,
        endpoint=address,
        region=region,
        access_key_id=key,
        secret_access_key=secret,
        config={"session_token": token} if token else {},
        virtual_hosted_style_request=False,
        client_options={
            "allow_http": address.startswith("http:"),
            "connect_timeout": SECONDS,
            "read_timeout": SECONDS,
            "timeout": "7d",  # of a whole object: a slow link is no error
        },
        retry_config={"max_retries": 0},  # s3fs is the next try
    )
