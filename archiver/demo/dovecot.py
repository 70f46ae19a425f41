"""A private Dovecot on loopback: real POP3 with sample mailboxes.

Owns a Dovecot process with its settings, its users, its log and its Maildirs
below one directory. It runs without root's rights (see ``processes``), does not
touch a Dovecot that the machine may run, and ends when it is closed. Sockets are
in a temporary directory, because the path of a Unix socket is limited to about
100 bytes. A link there leads to the files, because the settings allow no path
with a space or a percent sign.

Written for Dovecot 2.3: the settings of 2.4 have other names.
"""

import grp
import itertools
import os
import pwd
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

from archiver.demo import SessionLog, processes
from archiver.demo.certificates import self_signed
from archiver.errors import OperatorNeeded

__all__ = ["Dovecot", "unavailable"]

_START_SECONDS = 20.0
_STOP_SECONDS = 10.0
_LOG_SECONDS = 10.0
_USER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]*")

# https://doc.dovecot.org/2.3/settings/core/ and .../settings/pop3/
_SETTINGS = """\
base_dir = {sockets}
state_dir = {sockets}
log_path = {files}/dovecot.log
log_timestamp =
mail_log_prefix = "%s(%u): "
protocols = pop3
listen = {host}
default_internal_user = {user}
default_internal_group = {group}
default_login_user = {user}
first_valid_uid = 1
default_process_limit = 1024
default_client_limit = 8192
mail_max_userip_connections = 4096

ssl = yes
ssl_cert = <{files}/{cert}
ssl_key = <{files}/{key}
ssl_min_protocol = TLSv1.2
disable_plaintext_auth = no
auth_mechanisms = plain login
auth_failure_delay = 0

# A file for each user: a file that it knows already is looked at again only in the next second.
passdb {{
  driver = passwd-file
  args = scheme=PLAIN {files}/users/%u
}}
userdb {{
  driver = static
  args = uid={uid} gid={gid} home={files}/mail/%u allow_all_users=yes
}}
mail_location = maildir:~/
# What a crash of this machine would do to sample mail does not matter.
mail_fsync = never

# Without root's rights nothing can be shut in by chroot. Processes serve one client after another
# (service_count = 0), so that hundreds of log-ins do not cost hundreds of process starts.
service pop3-login {{
  chroot =
  service_count = 0
  client_limit = 4096
  inet_listener pop3 {{
    port = {pop3_port}
  }}
  inet_listener pop3s {{
    port = {pop3s_port}
    ssl = yes
  }}
}}
service pop3 {{
  service_count = 0
}}
service anvil {{
  chroot =
  # No penalty for failed log-ins: tests fail them on purpose.
  unix_listener anvil-auth-penalty {{
    mode = 0
  }}
}}
service stats {{
  chroot =
}}
protocol pop3 {{
  pop3_lock_session = {lock_session}
  pop3_logout_format = top=%t retr=%r/%b del=%d/%m size=%s
}}
{extra_settings}
"""

_LOGOUT = re.compile(
    r"pop3\((?P<user>[^)]*)\): Info: (?:Disconnected: )?(?P<reason>.*?)"
    r" top=(?P<top>\d+) retr=(?P<retr>\d+)/(?P<retr_bytes>\d+) del=(?P<dele>\d+)/(?P<listed>\d+) size=\d+$"
)


def unavailable(directory: Path | None = None) -> str | None:
    """Why Dovecot is not available here (in ``directory``, if given); None if it is."""
    program = _program()
    if program is None:
        return "dovecot is not installed"
    answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)  # noqa: S603
    version = answer.stdout.strip()
    if not version.startswith("2.3."):
        return f"dovecot {version or 'of unknown version'} is not of the 2.3 series"
    if not any(Path(program).resolve().parents[1].glob("lib*/dovecot/**/pop3-login")):
        return "dovecot's POP3 server is not installed (Debian: dovecot-pop3d)"
    try:
        _user_and_group()
    except KeyError:
        return "dovecot wants names, and the user or group that it would run as has none"
    blocked = processes.unreachable(directory) if directory else None
    return f"dovecot: {blocked}" if blocked else None


class Dovecot:
    """A running Dovecot; implements ``archiver.demo.MailServer``, which documents its methods.

    ``directory`` is made when it is not there; an earlier one's users and mail
    are there again. ``users`` gives each one's password. ``lock_session`` lets
    one session at a time into a mailbox (the second gets ``[IN-USE]`` after ten
    seconds); Dovecot's own default is not to. ``extra_settings`` is added at
    the end of dovecot.conf as it is.
    Raises OperatorNeeded when Dovecot cannot be had or does not start.
    """

    host = processes.HOST

    def __init__(
        self,
        directory: Path,
        users: Mapping[str, str] | None = None,
        *,
        lock_session: bool = False,
        extra_settings: str = "",
    ) -> None:
        program, reason = _program(), unavailable(directory)
        if program is None or reason is not None:
            raise OperatorNeeded(f"cannot start a private Dovecot: {reason}")
        self._directory = directory.resolve()
        self._delivered = itertools.count()
        self._mail = self._directory / "mail"
        self._mail.mkdir(parents=True, exist_ok=True)
        self._users = self._directory / "users"
        self._users.mkdir(exist_ok=True)
        for user, password in (users or {}).items():
            self._write_user(user, password)
        self.log_file = self._directory / "dovecot.log"
        self.log_file.touch()
        self.ca_file, key = self_signed(self._directory)
        self.pop3_port, self.pop3s_port = processes.free_ports(2)
        self._sockets = Path(tempfile.mkdtemp(prefix="dovecot-"))
        self._sockets.chmod(0o755)  # Dovecot wants it so; each socket has its own mode
        try:
            self._process = self._start(
                program, key, lock_session=lock_session, extra_settings=extra_settings
            )
        except BaseException:
            shutil.rmtree(self._sockets, ignore_errors=True)
            raise

    def _start(
        self, program: str, key: Path, *, lock_session: bool, extra_settings: str
    ) -> subprocess.Popen[bytes]:
        uid, gid = processes.owner()
        user, group = _user_and_group()
        files = self._sockets / "files"
        files.symlink_to(self._directory)
        settings = self._directory / "dovecot.conf"
        settings.write_text(
            _SETTINGS.format(
                sockets=self._sockets,
                files=files,
                host=self.host,
                user=user,
                group=group,
                uid=uid,
                gid=gid,
                cert=self.ca_file.name,
                key=key.name,
                pop3_port=self.pop3_port,
                pop3s_port=self.pop3s_port,
                lock_session="yes" if lock_session else "no",
                extra_settings=extra_settings,
            )
        )
        processes.give(self._directory)
        processes.give(self._sockets)
        process = processes.start([program, "-F", "-c", str(settings)], self.log_file)
        try:
            processes.wait_until(self._greets, process, self.log_file, seconds=_START_SECONDS)
        except BaseException:
            processes.stop(process, seconds=_STOP_SECONDS)
            raise
        return process

    def _greets(self) -> bool:
        try:
            with socket.create_connection((self.host, self.pop3_port), timeout=_START_SECONDS) as connection:
                return connection.recv(3) == b"+OK"
        except OSError:
            return False

    def url(self, user: str) -> str:
        return f"pop3s://{quote(user, safe='')}@{self.host}:{self.pop3s_port}"

    def add_user(self, user: str, password: str) -> None:
        if self._secret(user).exists():
            raise ValueError(f"the user {user!r} exists")
        self._write_user(user, password)

    def deliver(self, user: str, messages: Iterable[bytes]) -> None:
        maildir = self._maildir(user)
        uid, gid = processes.owner()
        for message in messages:
            # Dovecot numbers what is new in the order of the names. S and W are the size as it is and
            # with CRLF; it trusts them and need not read every message to answer LIST.
            seconds, nanoseconds = divmod(time.time_ns(), 10**9)
            unique = f"M{nanoseconds:09d}P{os.getpid()}Q{next(self._delivered):09d}"
            name = f"{seconds}.{unique}.localhost,S={len(message)},W={len(message)}"
            written = maildir / "tmp" / name
            written.write_bytes(message)
            os.chown(written, uid, gid)
            written.replace(maildir / "new" / name)

    def messages(self, user: str) -> list[bytes]:
        return [path.read_bytes() for path in self._paths(user)]

    def remove(self, user: str, number: int) -> None:
        if number < 1:
            raise IndexError(number)
        self._paths(user)[number - 1].unlink()

    def sessions(self, *, at_least: int = 0) -> list[SessionLog]:
        deadline = time.monotonic() + _LOG_SECONDS
        # Its log process writes a little after the client was answered.
        while len(found := self._logged()) < at_least:
            if time.monotonic() > deadline:
                raise TimeoutError(f"Dovecot logged {len(found)} sessions, not {at_least}")
            time.sleep(0.01)
        return found

    def close(self) -> None:
        processes.stop(self._process, seconds=_STOP_SECONDS)
        shutil.rmtree(self._sockets, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _secret(self, user: str) -> Path:
        if not _USER_NAME.fullmatch(user):
            raise ValueError(f"Dovecot cannot have a user {user!r} here")
        return self._users / user

    def _write_user(self, user: str, password: str) -> None:
        secret = self._secret(user)
        if {":", "\n"} & set(password):
            raise ValueError("Dovecot's users file cannot take a password with a colon or a line end")
        for name in ("tmp", "new", "cur"):
            (self._mail / user / name).mkdir(parents=True, exist_ok=True)
        processes.give(self._mail / user)
        secret.touch(mode=0o600)
        secret.write_text(f"{user}:{{PLAIN}}{password}::::::\n")
        processes.give(secret)

    def _maildir(self, user: str) -> Path:
        maildir = self._mail / user
        if not (_USER_NAME.fullmatch(user) and maildir.is_dir()):
            raise KeyError(user)
        return maildir

    def _paths(self, user: str) -> list[Path]:
        maildir = self._maildir(user)
        return sorted(
            [*(maildir / "new").iterdir(), *(maildir / "cur").iterdir()], key=lambda path: path.name
        )

    def _logged(self) -> list[SessionLog]:
        lines = self.log_file.read_text(errors="replace").splitlines()
        return [
            SessionLog(
                user=line["user"],
                quit=line["reason"] == "Logged out",
                retr=int(line["retr"]),
                retr_bytes=int(line["retr_bytes"]),
                top=int(line["top"]),
                dele=int(line["dele"]),
                listed=int(line["listed"]),
            )
            for line in map(_LOGOUT.search, lines)
            if line
        ]


def _program() -> str | None:
    # Ordinary users often lack the directories of daemons in their PATH.
    places = [os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"]
    return shutil.which("dovecot", path=os.pathsep.join(places))


def _user_and_group() -> tuple[str, str]:
    """The names of its user and group. Raises KeyError if they have none, as in some containers."""
    uid, gid = processes.owner()
    return pwd.getpwuid(uid).pw_name, grp.getgrgid(gid).gr_name
