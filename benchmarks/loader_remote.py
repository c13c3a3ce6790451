"""`loader.py --remote`: the same records read from one S3 server by ours and by other loaders.

The server is one process of moto's, started here and ended with the run. litdata's client refuses plain http: `--tls`
lets the server speak https, with a certificate made for the run. The first epoch begins without a local copy, the
second one with what the first left. Of the others that `loader.py` knows, megatron-energon is not among them: its S3
goes through a configuration of multistorageclient's. Nor is webshart: version 0.4.6 reads folders and huggingface.co,
an address that is fixed in it.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import torch

from benchmarks.loader_peers import BUFFER, RECORDS, ROWS, LitData, Mosaic, Ours, WebDataset, _decode, rows
from shards.reader import Reader
from stages.system.storage.locations import Location
from stages.system.storage.mirror import Mirror

BUCKET, HOST, START_SECONDS = "records", "127.0.0.1", 60
DAY = timedelta(days=1)
CERTIFICATES = ("AWS_CA_BUNDLE", "SSL_CERT_FILE")
"""Where clients look for a certificate to trust: those of botocore, and those of OpenSSL or rustls."""
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass(frozen=True)
class Server:
    """Where the server is, and the certificate by which its clients know it where it speaks https."""

    address: str
    certificate: Path | None


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of the loopback address and its key, for a day; the package is one that moto needs anyway."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - DAY, now + DAY)
    made = made.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(HOST))]), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    certificate_file, key_file = folder / "server.pem", folder / "server.key"
    certificate_file.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(pem))
    key_file.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return certificate_file, key_file


@contextmanager
def s3_server(folder: Path, tls: bool = False) -> Iterator[Server]:
    """A server on loopback, ended with the block; its certificate and its log lie in the folder."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    with open(folder / "server.log", "wb") as log:
        command = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)]
        certificate = None
        if tls:
            certificate, key = make_certificate(folder)
            command += ["-c", str(certificate), "-k", str(key)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with socket.socket() as probe:
                if probe.connect_ex((HOST, port)) == 0:
                    break
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the S3 server did not start: {folder / 'server.log'} says why")
            time.sleep(0.2)
        yield Server(f"{'https' if tls else 'http'}://{HOST}:{port}", certificate)
    finally:
        server.terminate()
        server.wait()


def remote_environment(server: Server, folder: Path) -> dict[str, str]:
    """Where each loader's client looks for the server and its certificate, and where ours keeps its copies."""
    places = {"AWS_ENDPOINT_URL": server.address, "S3_ENDPOINT_URL": server.address}
    places["SOLLUNE_STORAGE"] = str(copy_of(folder / "sollune"))
    certificate = {} if server.certificate is None else dict.fromkeys(CERTIFICATES, str(server.certificate))
    return {**KEYS, **places, **certificate}


def copy_of(folder: Path) -> Path:
    """Where a loader keeps on this machine what it fetched."""
    return folder.with_name(f"{folder.name}-copy")


def forget_copy(folder: Path) -> None:
    """Remove what a loader fetched."""
    shutil.rmtree(copy_of(folder), ignore_errors=True)
    copy_of(folder).mkdir(parents=True)


def client() -> Any:
    """boto3's client of the server that the environment names."""
    import boto3

    return boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], verify=os.environ.get("AWS_CA_BUNDLE"))


def upload(sources: dict[str, Path]) -> None:
    """Every file of these folders, under the name of its loader."""
    s3 = client()
    s3.create_bucket(Bucket=BUCKET)
    for name, folder in sources.items():
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            s3.upload_file(str(path), BUCKET, f"{name}/{path.relative_to(folder)}")


class RemoteOurs(Ours):
    """shards.reader on a location: shards are fetched whole, ahead of need, and checked against the manifest."""

    def open(self, _cache: Path, _folder: Path, workers: int) -> Any:
        """The manifest is brought first, as every command does."""
        location = Location("s3", f"{BUCKET}/cache")
        Mirror(location).bring()
        return Reader(location.folder, batch_size=ROWS, memory_budget_bytes=0, workers=workers)


class RemoteWebDataset(WebDataset):
    """webdataset streaming each tar from the server as it reads it, as FastGen's loader of trajectories does."""

    def open(self, cache: Path, _folder: Path, workers: int) -> Any:
        """Shards in random order, records through a buffer."""
        import webdataset as wds
        from webdataset.tariterators import tar_file_expander

        names = [f"cache/data/{path.name}" for path in sorted((cache / "data").glob("train-*.tar"))]

        def streams(source: Any) -> Iterator[dict[str, Any]]:
            s3 = client()
            for sample in source:
                name = sample["url"]
                yield {"url": name, "stream": s3.get_object(Bucket=BUCKET, Key=name)["Body"]}

        stream = wds.DataPipeline(
            wds.SimpleShardList(names),
            wds.detshuffle(bufsize=len(names), seed=0),
            wds.split_by_worker,
            streams,
            tar_file_expander,
            wds.tariterators.group_by_keys,
            wds.shuffle(BUFFER),
            wds.map(_decode),
            wds.batched(RECORDS, collation_fn=rows),
        )
        return torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers)


class RemoteMosaic(Mosaic):
    """mosaicml-streaming, copying shards into a folder."""

    def open(self, _cache: Path, folder: Path, workers: int) -> Any:
        """Its elastic order, py1e by default."""
        from streaming import StreamingDataLoader, StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        where = {"remote": f"s3://{BUCKET}/{folder.name}", "local": str(copy_of(folder))}
        stream = StreamingDataset(**where, shuffle=True, shuffle_seed=0, batch_size=RECORDS)
        return StreamingDataLoader(stream, batch_size=RECORDS, num_workers=workers, collate_fn=rows)


class RemoteLitData(LitData):
    """litdata, copying chunks into a folder."""

    def open(self, _cache: Path, folder: Path, workers: int) -> Any:
        """Chunks permuted, records permuted in them."""
        import litdata

        options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
        where, local = f"s3://{BUCKET}/{folder.name}", str(copy_of(folder))
        stream = litdata.StreamingDataset(where, local, shuffle=True, seed=0, storage_options=options)
        return litdata.StreamingDataLoader(stream, batch_size=RECORDS, num_workers=workers, collate_fn=rows)


REMOTE_LOADERS = {
    "sollune": RemoteOurs(),
    "webdataset": RemoteWebDataset(),
    "mosaicml-streaming": RemoteMosaic(),
    "litdata": RemoteLitData(),
}
