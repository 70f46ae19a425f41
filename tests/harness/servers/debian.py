"""Five servers from Debian packages that were unpacked, not installed.

They insist on fixed places, system users and PAM, so each runs in mount and
process namespaces of its own: there the unpacked files lie at ``/mnt``, the
server's directory at ``/media``, and passwd, shadow and group name a few users
more. The machine sees nothing of it. When the first process of the
namespace is killed, the kernel ends all others with it.
"""

import os
import shutil
import signal
import smtplib
import socket
import string
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from archiver.demo import processes
from archiver.demo.certificates import self_signed
from archiver.pop3 import Tls
from tests.harness import servers

_ROOT: Final = servers.CACHE / "debian"
_PASSWORD: Final = "correct horse"
_HASHED: Final = (  # openssl passwd -6 -salt archiver "correct horse"
    "$6$archiver$uJ6oLDZTZ3hm7o/LoenummO4tbRMbbB9RhJnF8JyFbKG9XpunfAwpO8LitTCNYBM6uFU9I1VBpAPY.UBXcP2U0"
)
_USERS: Final = 40
_FIRST_UID: Final = 20_001
_START_SECONDS: Final = 30.0
_NOBODY: Final = 65534

# What sh runs first in the namespaces, as their first process.
_NAMESPACE = """\
set -e
mount --bind {root} /mnt
mount --bind {directory} /media
export PATH=/mnt/usr/sbin:/mnt/usr/bin:$PATH
libraries=$(echo /mnt/usr/lib/*-linux-gnu /mnt/lib/*-linux-gnu /mnt/usr/lib/*-linux-gnu/mailutils9 | tr ' ' :)
export LD_LIBRARY_PATH=/mnt/usr/lib:/mnt/usr/lib/courier-authlib:$libraries
export SASL_PATH=$(echo /usr/lib/*-linux-gnu/sasl2 /mnt/usr/lib/*-linux-gnu/sasl2 | tr ' ' :)
"""

_SYSTEM_USERS = """\
for name in passwd shadow group; do mount --bind /media/etc/$name /etc/$name; done
mount --bind /media/etc/pam.d /etc/pam.d
mount --bind /media/spool /var/mail
"""

_LISTEN = "exec socat TCP-LISTEN:$port,bind=127.0.0.1,reuseaddr,fork,max-children=32"


@dataclass(frozen=True, slots=True)
class _Recipe:
    """How a server is set up and started. ``script`` runs in the namespace, after ``_NAMESPACE``."""

    script: str
    store: "Callable[[Path, dict[str, int]], _Store]"
    program: str
    ports: tuple[Tls, ...] = (Tls.NONE,)
    prepare: Callable[[Path, dict[str, int]], None] = lambda _directory, _ports: None


class _Store:
    """Where a server keeps mail: how it gets there, and what is there."""

    def __init__(self, directory: Path, ports: dict[str, int]) -> None:
        self.directory = directory
        self.ports = ports

    def deliver(self, user: str, messages: Iterable[bytes]) -> None:
        raise NotImplementedError

    def read(self, user: str) -> list[bytes]:
        raise NotImplementedError


class _Mbox(_Store):
    """One file a user, with LF. No sample message has a line that begins with ``From ``."""

    def deliver(self, user: str, messages: Iterable[bytes]) -> None:
        path = self.directory / "spool" / user
        with path.open("ab") as out:
            for message in messages:
                line = b"From sender@example.com Mon Jan  1 00:00:00 2024\n"
                out.write(line + message.replace(b"\r\n", b"\n") + b"\n")
        path.chmod(0o600)
        os.chown(path, _uid(user), _NOBODY)

    def read(self, user: str) -> list[bytes]:
        path = self.directory / "spool" / user
        if not path.exists():
            return []
        _, *parts, _ = (b"\n" + path.read_bytes() + b"From ").split(b"\nFrom ")
        return [part.partition(b"\n")[2].replace(b"\n", b"\r\n") for part in parts]


class _Maildir(_Store):
    """Courier's."""

    def deliver(self, user: str, messages: Iterable[bytes]) -> None:
        for number, message in enumerate(messages):
            path = (
                self.directory / "mail" / user / "Maildir" / "new" / f"{1700000000 + number}.M{number}.test"
            )
            path.write_bytes(message.replace(b"\r\n", b"\n"))
            os.chown(path, _NOBODY, _NOBODY)

    def read(self, user: str) -> list[bytes]:
        maildir = self.directory / "mail" / user / "Maildir"
        paths = [*(maildir / "new").iterdir(), *(maildir / "cur").iterdir()]
        return [
            path.read_bytes().replace(b"\n", b"\r\n") for path in sorted(paths, key=lambda path: path.name)
        ]


class _CyrusSpool(_Store):
    """Delivery is by LMTP, which adds header fields; an inbox exists from the first login on."""

    def deliver(self, user: str, messages: Iterable[bytes]) -> None:
        user_pass = [b"", f"USER {user}\r\n".encode(), f"PASS {_PASSWORD}\r\n".encode(), b"QUIT\r\n"]
        address = ("127.0.0.1", self.ports["none"])
        with socket.create_connection(address) as login, login.makefile("rwb") as lines:
            for command in user_pass:
                lines.write(command)
                lines.flush()
                answer = lines.readline()
                if not answer.startswith(b"+OK"):
                    raise AssertionError(f"Cyrus does not let {user} in: {answer!r}")
        for message in messages:
            with smtplib.LMTP("127.0.0.1", self.ports["lmtp"]) as lmtp:
                lmtp.sendmail("sender@example.com", [user], message)

    def read(self, user: str) -> list[bytes]:
        # Mailboxes lie in directories with made-up names; each one's header file has the mailbox's own.
        owner = f"N user.{user} ".encode()
        for header in (self.directory / "spool").rglob("cyrus.header"):
            if owner in header.read_bytes():
                paths = [path for path in header.parent.iterdir() if path.name[:-1].isdecimal()]
                return [path.read_bytes() for path in sorted(paths, key=lambda path: int(path.name[:-1]))]
        return []


def _uid(user: str) -> int:
    return _FIRST_UID + int(user.removeprefix("u"))


def _users() -> list[str]:
    return [f"u{number}" for number in range(1, _USERS + 1)]


def _system_users(directory: Path, _ports: dict[str, int]) -> None:
    """Copies of the system's files, with test users and what the daemons want."""
    (directory / "spool").mkdir()
    (directory / "spool").chmod(0o1777)
    etc = directory / "etc"
    etc.mkdir()
    shutil.copytree("/etc/pam.d", etc / "pam.d")
    for service in ("popa3d", "solid-pop3d", "pop3d"):
        (etc / "pam.d" / service).write_text(
            "auth required pam_unix.so\naccount required pam_permit.so\nsession required pam_permit.so\n"
        )
    passwd, group = Path("/etc/passwd").read_text(), Path("/etc/group").read_text()
    shadow = ""
    for number, daemon in enumerate(("popa3d", "spop3d"), start=_FIRST_UID + _USERS + 1):
        passwd += f"{daemon}:x:{number}:{_NOBODY}::/nonexistent:/bin/false\n"
        shadow += f"{daemon}:*:19000:0:99999:7:::\n"
        group += f"{daemon}:x:{number}:\n"
    for user in _users():
        passwd += f"{user}:x:{_uid(user)}:{_NOBODY}::/media/home:/bin/sh\n"
        shadow += f"{user}:{_HASHED}:19000:0:99999:7:::\n"
    (directory / "home").mkdir()
    for name, text in (("passwd", passwd), ("shadow", shadow), ("group", group)):
        (etc / name).write_text(text)
    (etc / "shadow").chmod(0o640)
    (directory / "pop3d.conf").write_text(
        "mode inetd;\n"
        "mailbox { mailbox-type mbox; }\n"
        "auth { authentication generic:system:pam; authorization system; }\n"
        "pam { service pop3d; }\n"
        "tls { ssl-certificate-file /media/cert.pem; ssl-key-file /media/key.pem; }\n"
        "tls-mode ondemand;\n"
    )


def _courier_users(directory: Path, _ports: dict[str, int]) -> None:
    etc = directory / "etc"
    shutil.copytree(_ROOT / "etc" / "courier", etc)
    lines = [
        f"{user}\thome=/media/mail/{user}|mail=/media/mail/{user}/Maildir|uid={_NOBODY}|gid={_NOBODY}"
        f"|systempw={_HASHED}\n"
        for user in _users()
    ]
    (etc / "userdb").write_text("".join(lines))
    (etc / "userdb").chmod(0o600)
    daemon = (etc / "authdaemonrc").read_text().splitlines()
    (etc / "authdaemonrc").write_text(
        "\n".join(
            'authmodulelist="authuserdb"' if line.startswith("authmodulelist=") else line for line in daemon
        )
        + "\n"
    )
    for user in _users():
        for name in ("new", "cur", "tmp"):
            (directory / "mail" / user / "Maildir" / name).mkdir(parents=True)
    _give_to_nobody(directory / "mail")
    (directory / "both.pem").write_text(
        (directory / "cert.pem").read_text() + (directory / "key.pem").read_text()
    )
    _give_to_nobody(directory / "both.pem")


_CYRUS_SETTINGS = string.Template("""\
configdirectory: /media/conf
partition-default: /media/spool
defaultpartition: default
proc_path: /media/run/proc
mboxname_lockpath: /media/run/lock
statuscache_db_path: /media/run/statuscache.db
duplicate_db_path: /media/run/deliver.db
tls_sessions_db_path: /media/run/tls_sessions.db
lmtpsocket: /media/run/lmtp
idlesocket: /media/run/idle
notifysocket: /media/run/notify
sasl_mech_list: PLAIN
sasl_pwcheck_method: auxprop
sasl_auxprop_plugin: sasldb
sasl_sasldb_path: /media/sasldb2
allowplaintext: yes
virtdomains: off
unixhierarchysep: yes
altnamespace: yes
autocreate_users: anyone
autocreate_post: yes
autocreate_quota: 0
servername: localhost
cyrus_user: nobody
tls_server_cert: /media/cert.pem
tls_server_key: /media/key.pem
""")

_CYRUS_SERVICES = string.Template("""\
START {
  recover cmd="/mnt/usr/lib/cyrus/bin/ctl_cyrusdb -C /media/imapd.conf -r"
}
SERVICES {
  pop3 cmd="/mnt/usr/lib/cyrus/bin/pop3d -C /media/imapd.conf" listen="127.0.0.1:$none" prefork=0
  pop3s cmd="/mnt/usr/lib/cyrus/bin/pop3d -s -C /media/imapd.conf" listen="127.0.0.1:$implicit" prefork=0
  lmtp cmd="/mnt/usr/lib/cyrus/bin/lmtpd -C /media/imapd.conf -a" listen="127.0.0.1:$lmtp" prefork=0
}
EVENTS {
}
""")


def _cyrus_users(directory: Path, ports: dict[str, int]) -> None:
    for name in ("conf", "spool", "run"):
        (directory / name).mkdir()
    (directory / "imapd.conf").write_text(_CYRUS_SETTINGS.substitute())
    (directory / "cyrus.conf").write_text(_CYRUS_SERVICES.substitute(ports))
    (directory / "users").write_text("".join(f"{user}\n" for user in _users()))
    _give_to_nobody(directory)


def _give_to_nobody(path: Path) -> None:
    for each in (path, *path.rglob("*")):
        os.chown(each, _NOBODY, _NOBODY, follow_symlinks=False)


_RECIPES: Final = {
    "courier": _Recipe(
        program="usr/lib/courier/courier/courierpop3d",
        prepare=_courier_users,
        store=_Maildir,
        ports=(Tls.STARTTLS, Tls.NONE),
        script=r"""
mount -t tmpfs tmpfs /run
mkdir -p /run/courier/authdaemon
cp -a /etc /run/etc
mkdir -p /run/etc/courier
echo 'courier:x:65534:65534::/:/bin/false' >>/run/etc/passwd
echo 'courier:x:65534:' >>/run/etc/group
mount --bind /run/etc /etc
mount --bind /media/etc /etc/courier
sed 's,/usr/lib/courier,/mnt&,' /mnt/usr/sbin/makeuserdb | perl - -f /etc/courier/userdb
/mnt/usr/lib/courier/courier-authlib/authdaemond &
until [ -S /run/courier/authdaemon/socket ]; do sleep 0.05; done
set -a
. /etc/courier/pop3d
. /etc/courier/pop3d-ssl
POP3AUTH="PLAIN LOGIN CRAM-MD5" POP3AUTH_TLS="PLAIN LOGIN" POP3_TLS_REQUIRED=0 POP3_STARTTLS=YES
COURIERTLS=/mnt/usr/bin/couriertls TLS_CERTFILE=/media/both.pem TLS_CACHEFILE= TLS_DHPARAMS= TLS_TRUSTCERTS=
TCPLOCALIP=127.0.0.1 TCPLOCALPORT=110 TCPREMOTEIP=127.0.0.1 TCPREMOTEPORT=1 TCPREMOTEHOST=localhost
daemon=/mnt/usr/lib/courier/courier
"""
        f'{_LISTEN} "EXEC:$daemon/courierpop3login $daemon/courierpop3d Maildir,nofork"\n',
    ),
    "cyrus": _Recipe(
        program="usr/lib/cyrus/bin/pop3d",
        prepare=_cyrus_users,
        store=_CyrusSpool,
        ports=(Tls.IMPLICIT, Tls.STARTTLS, Tls.NONE),
        script=f"""
while read -r user; do
    echo '{_PASSWORD}' | saslpasswd2 -f /media/sasldb2 -p -c -u localhost "$user"
done </media/users
chown nobody /media/sasldb2
# Not by exec: the kernel forgets to end a process with its parent once that has become another user.
/mnt/usr/lib/cyrus/bin/master -C /media/imapd.conf -M /media/cyrus.conf -p /media/run/master.pid &
wait
""",
    ),
    "popa3d": _Recipe(
        program="usr/sbin/popa3d",
        prepare=_system_users,
        store=_Mbox,
        script=_SYSTEM_USERS
        + "mount -t tmpfs tmpfs /var/lib\nmkdir -m 755 /var/lib/popa3d\n"
        + f"{_LISTEN} EXEC:/mnt/usr/sbin/popa3d\n",
    ),
    "solid-pop3d": _Recipe(
        program="usr/sbin/solid-pop3d",
        prepare=_system_users,
        store=_Mbox,
        script=_SYSTEM_USERS + f'{_LISTEN} "EXEC:/mnt/usr/sbin/solid-pop3d -f /mnt/etc/spop3d.conf,nofork"\n',
    ),
    "mailutils": _Recipe(
        program="usr/sbin/pop3d",
        prepare=_system_users,
        store=_Mbox,
        ports=(Tls.STARTTLS, Tls.NONE),
        script=_SYSTEM_USERS
        + "daemon=/mnt/usr/sbin/pop3d\n"
        + f'{_LISTEN} "EXEC:$daemon --no-site-config --config-file=/media/pop3d.conf --inetd,nofork"\n',
    ),
}


class Unpacked:
    """Implements ``Server``."""

    def __init__(self, name: str, directory: Path) -> None:
        recipe = _RECIPES[name]
        directory.mkdir(parents=True)
        directory.chmod(0o755)
        ports = dict(zip(("none", "implicit", "lmtp"), processes.free_ports(3), strict=True))
        self.ca_file, _ = self_signed(directory)
        recipe.prepare(directory, ports)
        self.ports = {tls: ports["implicit" if tls is Tls.IMPLICIT else "none"] for tls in recipe.ports}
        self._store = recipe.store(directory, ports)
        self._numbers = count(1)
        script, output = directory / "start.sh", directory / "log"
        script.write_text(
            _NAMESPACE.format(root=_ROOT, directory=directory) + f"port={ports['none']}\n" + recipe.script
        )
        with output.open("wb") as said:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", script],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                cwd="/",
                start_new_session=True,
            )
        try:
            processes.wait_until(self._greets, self._process, output, seconds=_START_SECONDS)
        except BaseException:
            self.close()
            raise

    def _greets(self) -> bool:
        try:
            address = ("127.0.0.1", self.ports[Tls.NONE])
            with socket.create_connection(address, timeout=_START_SECONDS) as connection:
                return connection.recv(3) == b"+OK"
        except OSError:
            return False

    def new_user(self, messages: Iterable[bytes]) -> tuple[str, str]:
        number = next(self._numbers)
        if number > _USERS:
            raise AssertionError(f"there are {_USERS} users; make more of them")
        user = f"u{number}"
        self._store.deliver(user, messages)
        return user, _PASSWORD

    def stored(self, user: str) -> list[bytes]:
        return self._store.read(user)

    def close(self) -> None:
        # unshare waits for the first process of the namespaces, and that is not gone before all others are.
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        if self._process.poll() is None:
            for first in children.read_text().split() or [str(self._process.pid)]:
                os.kill(int(first), signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def unavailable(name: str, _directory: Path) -> str | None:
    if not (_ROOT / _RECIPES[name].program).exists():
        return f"{name} was not unpacked; as root on Debian, tools/servers does it"
    if os.geteuid() != 0:
        return f"{name} runs in a namespace of its own, which needs root"
    probe = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"{name} needs namespaces: {probe.stderr.strip()}" if probe.returncode else None


def start(name: str, directory: Path) -> Unpacked:
    return Unpacked(name, directory)
