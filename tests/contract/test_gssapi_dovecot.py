"""Kerberos for real: a realm of our own on loopback, and a Dovecot that takes its tickets."""

import importlib.util
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from archiver.demo import dovecot as demo_dovecot
from archiver.demo import processes
from archiver.demo.dovecot import Dovecot
from archiver.pop3 import Endpoint, FailureKind, Loop, Mailbox, Pop3Error, Tls, TlsSettings
from tests.conftest import require
from tests.harness.servers import CACHE

pytestmark = [pytest.mark.kerberos, pytest.mark.xdist_group("kerberos")]

# Where tools/servers builds it: it must be compiled, so that no lock has it.
_BUILT = CACHE / "gssapi"
if _BUILT.is_dir():
    sys.path.append(str(_BUILT))

REALM = "ARCHIVER.TEST"
USER = "anna"
SERVICE = f"pop/localhost@{REALM}"
_START_SECONDS, _STOP_SECONDS = 20.0, 5.0

_CLIENT = """\
[libdefaults]
    default_realm = {realm}
    dns_lookup_kdc = false
    dns_lookup_realm = false
    dns_canonicalize_hostname = false
    rdns = false
    udp_preference_limit = 1
[realms]
    {realm} = {{
        kdc = 127.0.0.1:{port}
    }}
[domain_realm]
    localhost = {realm}
"""
_KDC = """\
[kdcdefaults]
    kdc_ports = {port}
    kdc_tcp_ports = {port}
    kdc_listen = 127.0.0.1:{port}
    kdc_tcp_listen = 127.0.0.1:{port}
[realms]
    {realm} = {{
        database_name = {directory}/principal
        key_stash_file = {directory}/stash
        acl_file = {directory}/kadm5.acl
    }}
"""


def unavailable(directory: Path) -> str | None:
    """Why there can be no Kerberos here, or None."""
    if importlib.util.find_spec("gssapi") is None:
        return "gssapi is not installed: CI=true tools/servers builds it, as root on Debian"
    if shutil.which("krb5kdc", path="/usr/sbin:/usr/bin") is None:
        return "krb5-kdc is not installed"
    if not list(Path("/usr/lib/dovecot").glob("**/libmech_gssapi.so")):
        return "dovecot-gssapi is not installed"
    return demo_dovecot.unavailable(directory)


@dataclass(frozen=True, slots=True)
class Realm:
    """A running key distribution centre, in whose directory all of it lies."""

    directory: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "KRB5_CONFIG": str(self.directory / "krb5.conf"),
            "KRB5_KDC_PROFILE": str(self.directory / "kdc.conf"),
        }

    def admin(self, request: str) -> None:
        self.run("kadmin.local", "-q", request)

    def run(self, *command: str) -> None:
        subprocess.run(command, env=self.environment, check=True, capture_output=True, timeout=60)

    def keytab(self, name: str, principal: str) -> Path:
        """A new principal, and the file of its keys."""
        file = self.directory / name
        self.admin(f"addprinc -randkey {principal}")
        self.admin(f"ktadd -norandkey -k {file} {principal}")
        return file


@pytest.fixture(scope="module")
def realm(server_directory: Path) -> Iterator[Realm]:
    require(unavailable(server_directory))
    directory = server_directory / "kerberos"
    directory.mkdir()
    [port] = processes.free_ports(1)
    (directory / "krb5.conf").write_text(_CLIENT.format(realm=REALM, port=port))
    (directory / "kdc.conf").write_text(_KDC.format(realm=REALM, port=port, directory=directory))
    made = Realm(directory)
    made.run("kdb5_util", "create", "-s", "-r", REALM, "-P", "a master key of no worth")
    log = directory / "kdc.log"
    with log.open("ab") as said:
        kdc = subprocess.Popen(
            ["krb5kdc", "-n", "-r", REALM],
            env=made.environment,
            stdout=said,
            stderr=said,
            stdin=subprocess.DEVNULL,
        )
    try:
        processes.wait_until(lambda: "starting..." in log.read_text(), kdc, log, seconds=_START_SECONDS)
        yield made
    finally:
        processes.stop(kdc, seconds=_STOP_SECONDS)


@pytest.fixture(scope="module")
def server(realm: Realm, server_directory: Path) -> Iterator[Dovecot]:
    keytab = realm.keytab("service.keytab", SERVICE)
    settings = f"""\
auth_mechanisms = plain gssapi
auth_gssapi_hostname = localhost
auth_krb5_keytab = {keytab}
auth_realms = {REALM}
import_environment = $import_environment KRB5_CONFIG={realm.directory}/krb5.conf
"""
    realm.directory.chmod(0o755)
    (realm.directory / "krb5.conf").chmod(0o644)
    processes.give(keytab)
    with Dovecot(server_directory / "gssapi", {USER: "not told"}, extra_settings=settings) as dovecot:
        dovecot.add_user("berta", "not told")
        yield dovecot


@pytest.fixture
def ticket(realm: Realm) -> Iterator[Path]:
    """This process logs in as anna, by her keytab."""
    keytab = realm.directory / "anna.keytab"
    if not keytab.exists():
        realm.keytab(keytab.name, f"{USER}@{REALM}")
    cache = realm.directory / "cache"
    names = {"KRB5_CONFIG": realm.directory / "krb5.conf", "KRB5_CLIENT_KTNAME": keytab, "KRB5CCNAME": cache}
    with environment(**names):
        yield keytab
    cache.unlink(missing_ok=True)


@contextmanager
def environment(**wanted: Path) -> Iterator[None]:
    """The library reads what the process's environment says."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update({name: str(value) for name, value in wanted.items()})
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                del os.environ[name]
            else:
                os.environ[name] = old


def log_in(server: Dovecot, user: str, tls: Tls = Tls.IMPLICIT) -> Mailbox:
    port = server.pop3s_port if tls is Tls.IMPLICIT else server.pop3_port
    endpoint = Endpoint("localhost", port, tls, user, "GSSAPI")
    mailbox = Mailbox.connect(endpoint, tls_settings=TlsSettings(ca_file=server.ca_file))
    try:
        mailbox.login("")
    except BaseException:
        mailbox.close()
        raise
    return mailbox


@pytest.mark.parametrize("tls", [Tls.IMPLICIT, Tls.STARTTLS], ids=lambda tls: tls.value)
def test_a_ticket_leads_to_the_mailbox(server: Dovecot, ticket: Path, tls: Tls) -> None:
    with log_in(server, USER, tls) as mailbox:
        assert mailbox.facts.mechanism == "GSSAPI"
        assert mailbox.list().entries == ()
        mailbox.quit()


def test_a_ticket_leads_to_no_other_mailbox(server: Dovecot, ticket: Path) -> None:
    with pytest.raises(Pop3Error, match="GSSAPI needs a Kerberos ticket") as caught:
        log_in(server, "berta")
    assert caught.value.kind is FailureKind.AUTH


def test_without_a_ticket_an_operator_is_needed(server: Dovecot, ticket: Path) -> None:
    nothing = environment(KRB5_CLIENT_KTNAME=ticket.parent / "nothing")
    with nothing, pytest.raises(Pop3Error, match="no Kerberos ticket for the server") as caught:
        log_in(server, USER)
    assert caught.value.kind is FailureKind.OPERATOR


def test_a_key_centre_that_is_away_comes_back_by_itself(server: Dovecot, ticket: Path) -> None:
    [port] = processes.free_ports(1)
    file = ticket.parent / "elsewhere.conf"
    file.write_text(_CLIENT.format(realm=REALM, port=port))
    elsewhere = environment(KRB5_CONFIG=file)
    with elsewhere, pytest.raises(Pop3Error, match="no Kerberos ticket for the server") as caught:
        log_in(server, USER)
    assert caught.value.kind is FailureKind.TRANSIENT


def test_sessions_that_share_a_thread_have_their_tickets_fetched_beside_it(
    server: Dovecot, ticket: Path
) -> None:
    """The library blocks while it asks the key centre: that is nothing for the thread of all."""
    mechanisms: queue.Queue[str | Pop3Error | None] = queue.Queue()
    threads: set[int] = set()

    def session() -> None:
        threads.add(threading.get_ident())
        try:
            with log_in(server, USER) as mailbox:
                mailbox.quit()
                mechanisms.put(mailbox.facts.mechanism)
        except Pop3Error as error:
            mechanisms.put(error)

    with ThreadPoolExecutor(2) as pool, closing(Loop(pool)) as loop:
        for _ in range(8):
            loop.begin(session)
        assert [mechanisms.get(timeout=60) for _ in range(8)] == ["GSSAPI"] * 8
    assert len(threads) == 1
