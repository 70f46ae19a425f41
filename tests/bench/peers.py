"""What people use instead: mpop, fetchmail, getmail6, s5cmd. How each is run, and whether it did its work.

Owns their configuration files and the look at what they wrote. Every peer is
set up as its manual says for the job, with nothing switched on that costs and
is not asked for: no header added, no message deleted.
"""

import pwd
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from archiver.demo import processes
from tests.bench.corpus import PASSWORD, Mailbox
from tests.bench.machine import BenchError, Cost, run, version_of

HOST = "localhost"
S5CMD_WORKERS = 32


@dataclass(frozen=True, slots=True)
class Peers:
    """Where the programs are. ``environment`` is the virtual environment that ``install`` made for them."""

    environment: Path

    def path(self, name: str) -> str | None:
        """A program, or None where it is not installed."""
        beside = self.environment / "bin" / name
        return str(beside) if beside.exists() else shutil.which(name)

    def there(self, name: str) -> str:
        """A program. Raises BenchError where it is not installed."""
        found = self.path(name)
        if found is None:
            raise BenchError(f"{name} is not installed")
        return found

    def missing(self, *names: str) -> str | None:
        """Which of these are not installed, in words; None when all are."""
        absent = [name for name in names if self.path(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None

    @property
    def python(self) -> str | None:
        """The interpreter that has obstore, or None."""
        found = self.environment / "bin" / "python"
        return str(found) if any(self.environment.glob("lib/python*/site-packages/obstore")) else None

    def versions(self) -> dict[str, str]:
        """Of those that are here."""
        asked = {
            "mpop": ("--version",),
            "fetchmail": ("--version",),
            "getmail": ("--version",),
            "s5cmd": ("version",),
        }
        found = {
            name: version_of(path, *arguments)
            for name, arguments in asked.items()
            if (path := self.path(name)) is not None
        }
        if self.python is not None:
            code = "import importlib.metadata as m; print(m.version('obstore'))"
            found["obstore"] = version_of(self.python, "-c", code)
        return {name: version for name, version in found.items() if version}


@dataclass(frozen=True, slots=True)
class Server:
    """Where a peer fetches from."""

    port: int
    ca_file: Path


def mpop_files(directory: Path, server: Server, boxes: Sequence[Mailbox]) -> list[Path]:
    """A configuration file for each mailbox, and the Maildir that it delivers to."""
    files = []
    for box in boxes:
        place = directory / box.user
        make_maildir(place / "mail")
        file = place / "mpoprc"
        file.write_text(
            "defaults\n"
            "tls on\ntls_starttls off\n"
            f"tls_trust_file {server.ca_file}\n"
            "account default\n"
            f"host {HOST}\nport {server.port}\nuser {box.user}\npassword {PASSWORD}\n"
            "keep on\nreceived_header off\n"
            f"uidls_file {place}/uidls\n"
            f"delivery maildir {place}/mail\n"
        )
        file.chmod(0o600)  # it refuses to read a password that others could
        files.append(file)
    return files


def mpop(program: str, files: Sequence[Path], processes_at_once: int = 1) -> Cost:
    """One run for each file: the messages that its file of UIDLs does not know."""
    if len(files) == 1:
        return run([program, "--quiet", "-C", str(files[0])])
    names = "\0".join(map(str, files)).encode()
    return run(
        ["xargs", "-0", "-n", "1", "-P", str(processes_at_once), program, "--quiet", "-C"], given=names
    )


def mpop_then_s5cmd(
    programs: tuple[str, str], file: Path, *, endpoint_url: str, target: str, environment: dict[str, str]
) -> Cost:
    """What one would put together: fetch to a Maildir, then copy it to a bucket."""
    mpop_program, s5cmd = programs
    script = (
        '"$0" --quiet -C "$1" && '
        '"$2" --log error --endpoint-url "$3" --numworkers "$4" cp "$5/" "$6" >/dev/null'
    )
    mail = file.parent / "mail" / "new"
    words = [mpop_program, str(file), s5cmd, endpoint_url, str(S5CMD_WORKERS), str(mail), target]
    return run(["sh", "-c", script, *words], environment=environment)


def s5cmd(
    program: str, directory: Path, *, endpoint_url: str, target: str, environment: dict[str, str]
) -> Cost:
    """A directory of files to a bucket."""
    options = ["--log", "error", "--endpoint-url", endpoint_url, "--numworkers", str(S5CMD_WORKERS)]
    return run([program, *options, "cp", f"{directory}/", target], environment=environment)


def fetchmail(program: str, directory: Path, server: Server, box: Mailbox) -> Cost:
    """All of a mailbox into one file of BSMTP, which no transport agent then takes."""
    directory.mkdir(parents=True)
    file = directory / "fetchmailrc"
    file.write_text(
        f"set no syslog\nset idfile {directory}/ids\n"
        f'poll {HOST} service {server.port} protocol pop3 user "{box.user}" password "{PASSWORD}" '
        f'ssl sslcertck sslcertfile "{server.ca_file}" keep fetchall bsmtp "{directory}/mail"\n'
    )
    file.chmod(0o600)
    cost = run([program, "--silent", "-f", str(file)], environment={"FETCHMAILHOME": str(directory)})
    written = (directory / "mail").read_bytes()
    check("fetchmail", box, written.count(b"\r\nDATA\r\n"), len(written), at_least=box.lf_bytes)
    return cost


def getmail(program: str, directory: Path, server: Server, box: Mailbox) -> Cost:
    """All of a mailbox into a Maildir."""
    make_maildir(directory / "mail")
    file = directory / "getmailrc"
    file.write_text(
        "[retriever]\ntype = SimplePOP3SSLRetriever\n"
        f"server = {HOST}\nport = {server.port}\nusername = {box.user}\npassword = {PASSWORD}\n"
        f"ca_certs = {server.ca_file}\n"
        f"[destination]\ntype = Maildir\npath = {directory}/mail/\nuser = {_owner()}\n"
        "[options]\nread_all = true\ndelete = false\ndelivered_to = false\nreceived = false\nverbose = 0\n"
    )
    processes.give(directory)
    cost = run([program, "--getmaildir", str(directory), "--rcfile", str(file)])
    check_maildir("getmail", directory / "mail", box, exactly=False)
    return cost


def _owner() -> str:
    return pwd.getpwuid(processes.owner()[0]).pw_name


def make_maildir(path: Path) -> None:
    for name in ("cur", "new", "tmp"):
        (path / name).mkdir(parents=True)


def check_maildir(who: str, path: Path, box: Mailbox, *, exactly: bool = True) -> None:
    """Whether all messages are there, and whole: as they were, with bare line feeds."""
    sizes = [file.stat().st_size for file in (path / "new").iterdir()]
    check(who, box, len(sizes), sum(sizes), at_least=box.lf_bytes)
    if exactly and sum(sizes) != box.lf_bytes:
        raise BenchError(f"{who} wrote {sum(sizes)} octets of {box.user}, not {box.lf_bytes}")


def check(who: str, box: Mailbox, count: int, octets: int, *, at_least: int) -> None:
    if count != box.count or octets < at_least:
        raise BenchError(
            f"{who} has {count} messages of {octets} octets of {box.user}, "
            f"which holds {box.count} of at least {at_least}"
        )
