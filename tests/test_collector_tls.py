"""TLS as a site has it: a certificate of its own CA, the agent's real client, and what each is told when it does not fit."""

import http.client
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.collector import Collector as Peer
from agent.collector import Refused, Unreachable, join
from agent.identity import load_or_create
from agent.pytest_plugin import _environment
from tests.collector_client import Client
from tests.house import Collector

OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(OPENSSL is None, reason="needs the openssl command (package openssl) to make certificates")


def openssl(*args: str | Path) -> None:
    done = subprocess.run([str(OPENSSL), *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def make_ca(root: Path, name: str) -> tuple[Path, Path]:
    cert, key = root / f"{name}.pem", root / f"{name}.key"
    made = ("-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    openssl("req", *made, "-subj", f"/CN={name}", "-keyout", key, "-out", cert)
    return cert, key


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, a certificate of it for 127.0.0.1, and a CA that has nothing to do with them."""
    root = tmp_path_factory.mktemp("certificates")
    ca, ca_key = make_ca(root, "ca")
    make_ca(root, "stranger")
    request, key = root / "server.csr", root / "server.key"
    made = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=collector")
    openssl("req", *made, "-keyout", key, "-out", request)
    (root / "ext").write_text("subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
    signed = ("-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-days", "2", "-extfile", root / "ext")
    openssl("x509", "-req", "-in", request, *signed, "-out", root / "server.pem")
    return root


class TlsHouse(Collector):
    """The usual collector, with a certificate; readiness is what it says of itself, as urllib does not know our CA."""

    def __init__(self, root: Path, certificates: Path) -> None:
        super().__init__(root)
        self.certificates = certificates
        self.url = f"https://127.0.0.1:{self.port}"
        with self.config_file.open("a") as config:
            config.write(f'tls_cert = "{certificates}/server.pem"\ntls_key = "{certificates}/server.key"\n')

    def _ready(self) -> bool:
        return "serving https://" in self.log.read_text()


@pytest.fixture
def house(tmp_path: Path, certificates: Path, store_kind: str) -> Iterator[TlsHouse]:
    made = TlsHouse(tmp_path, certificates)
    made.start()
    yield made
    made.stop()


def test_a_real_agent_joins_and_sends_over_tls_it_trusts(house: TlsHouse, tmp_path: Path) -> None:
    identity = load_or_create(str(tmp_path / "agent"))
    ca = str(house.certificates / "ca.pem")
    peer = Peer(house.url, ca)
    pinned, register = join(peer, identity, "house-token", "ws-1", ca_file=ca, now_ms=1)
    assert pinned.agent == identity.agent and register is not None
    agent = Client(house.port, key=identity.key)
    agent.append_some(3)
    headers = {"Sekisho-Agent": agent.id, "Content-Encoding": "gzip"}
    for first in (1, 2, 3):
        assert peer.ask("POST", "/v1/batches", agent.batch(first, first), headers).status == 200
    peer.close()
    assert "2014-02.csv" in house.run("tail", "-n", "1")


def test_a_ca_that_did_not_sign_it_is_refused_with_what_to_do(house: TlsHouse) -> None:
    for ca in (str(house.certificates / "stranger.pem"), ""):
        peer = Peer(house.url, ca)
        with pytest.raises(Unreachable, match=r"its certificate is refused \(.+\); set agent.collector.ca_file to the CA"):
            peer.ask("GET", "/healthz", None, {})
    with pytest.raises(Unreachable, match="ca_file is not there; copy the CA's certificate"):
        Peer(house.url, "/nowhere/ca.pem").ask("GET", "/healthz", None, {})
    with pytest.raises(Refused, match="http:// is for loopback only"):
        Peer("http://collector.example:8443")


def test_the_command_line_checks_the_certificate_too(house: TlsHouse) -> None:
    token = house.run("token", "create", "--role", "viewer").strip()
    command = [sys.executable, "-m", "server_stub.cli", "agents", "--url", house.url, "--token", token]
    for ca, code in (("ca", 0), ("stranger", 1)):
        named = [*command, "--ca-file", str(house.certificates / f"{ca}.pem")]
        done = subprocess.run(named, capture_output=True, text=True, env=_environment(), timeout=60)
        assert done.returncode == code, done.stderr
        assert len(done.stderr.splitlines()) == code and ("certificate" in done.stderr) == bool(code)


def test_one_connection_carries_many_requests(house: TlsHouse) -> None:
    context = ssl.create_default_context(cafile=str(house.certificates / "ca.pem"))
    connection = http.client.HTTPSConnection("127.0.0.1", house.port, timeout=20, context=context)
    connection.request("GET", "/healthz")
    connection.getresponse().read()
    kept = connection.sock
    for _ in range(5):
        connection.request("GET", "/readyz")
        assert connection.getresponse().read() == b'{"status":"ready"}'
        assert connection.sock is kept, "the collector closed the connection"
    connection.close()


def test_a_stranger_who_speaks_no_tls_harms_nobody(house: TlsHouse) -> None:
    plain = http.client.HTTPConnection("127.0.0.1", house.port, timeout=20)
    with pytest.raises((OSError, http.client.HTTPException)):
        plain.request("GET", "/healthz")
        plain.getresponse()
    plain.close()
    assert Peer(house.url, str(house.certificates / "ca.pem")).ask("GET", "/healthz", None, {}).status == 200


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('listen = "0.0.0.0:0"', 'which others can reach, but there is no TLS; set "tls_cert" and "tls_key"'),
        ('listen = "127.0.0.1:0"\ntls_cert = "CA"', "belong together; give both or neither"),
        ('smtp = "mail.example"', '"smtp" must be like "smtp://mail.example:587"'),
        ('[[collector.witness]]\nfile = "points.log"', "must be an absolute path"),
        ('listen = "127.0.0.1:0"\ntls_cert = "CA"\ntls_key = "OTHER"', "give PEM files that belong together"),
        ('listen = "127.0.0.1:0"\ntls_cert = "/nowhere"\ntls_key = "OTHER"', "give PEM files that belong together"),
    ],
)
def test_what_could_not_be_safe_does_not_start(tmp_path: Path, certificates: Path, table: str, said: str) -> None:
    table = table.replace("CA", f"{certificates}/ca.pem").replace("OTHER", f"{certificates}/stranger.key")
    config = tmp_path / "config.toml"
    config.write_text(f'[collector]\nstate_dir = "{tmp_path}/state"\n{table}\n')
    command = [sys.executable, "-m", "server_stub.cli", "serve", "-c", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), timeout=60)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
