"""The settings: ``ARCHIVER_*`` variables, an optional TOML file, and defaults that suit one machine.

A variable takes precedence over the file, and the file over the default. Only
the command line and the composition root import this module; all other modules
receive plain values. The descriptions are those in docs/reference/settings.md.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from archiver.errors import UsageError

PREFIX = "ARCHIVER_"
CONFIG = f"{PREFIX}CONFIG"
"""The variable that names the TOML file."""

_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


class Settings(BaseSettings):
    """All settings. A setting's variable is ``ARCHIVER_`` and the field's name in upper case."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", hide_input_in_errors=True)

    database_url: str = Field(
        default="sqlite:///archive/archiver.db",
        description=(
            "The index: `sqlite:///relative/path`, `sqlite:////absolute/path` or "
            "`postgresql://user:password@host:5432/name`. SQLite is for one machine. Several processes may "
            "share PostgreSQL, which needs `pip install 'archiver[postgres]'`."
        ),
    )
    store_url: str = Field(
        default="file:archive/store",
        description=(
            "The archive: `file:relative/path`, `file:/absolute/path` or `s3://bucket/prefix`. The prefix "
            "is optional. A directory needs a file system with hard links and fsync. Do not change the "
            "store of a database that has captures, unless you moved the objects."
        ),
    )
    s3_endpoint_url: str | None = Field(
        default=None,
        description=(
            "URL of the S3-compatible server, such as `https://s3.example.com:9000`. Default: Amazon S3. "
            "If set, buckets are addressed by path, unless `ARCHIVER_S3_ADDRESSING_STYLE` or the AWS "
            "configuration says otherwise."
        ),
    )
    s3_region: str | None = Field(
        default=None,
        description="Region of the bucket. Default: the region of the AWS configuration.",
    )
    s3_addressing_style: Literal["auto", "path", "virtual"] | None = Field(
        default=None,
        description=(
            "How requests name the bucket: in the `path`, in the host name (`virtual`), or as boto3 chooses "
            "(`auto`). Some providers refuse one of the two. Default: `addressing_style` of the AWS "
            "configuration."
        ),
    )
    secret_key: SecretStr | None = Field(
        default=None,
        description=(
            "Key that encrypts the passwords in the database: 32 random bytes in base64 (`openssl rand "
            "-base64 32`). To change it, set `NEW,OLD`: the first key encrypts, all keys decrypt. Keep it "
            "apart from the database and its backups."
        ),
    )
    file_group_read: bool = Field(
        default=False,
        description=(
            "Whether the group of the service's user may read new files of mail, journal and database. "
            "Default: only the user can, in whatever directory the files are."
        ),
    )
    accounts_file: Path | None = Field(
        default=None,
        description="TOML file of accounts that `archiver run` applies when it starts.",
    )
    workers: Count = Field(
        default=32,
        description=(
            "Polls that run at the same time in one process. Raise it if accounts are overdue while the "
            "CPU is idle, for example because servers are slow. One process can run hundreds, but mail "
            "servers may object to that many sessions."
        ),
    )
    uploads: Count = Field(
        default=16,
        description="Uploads that run at the same time in one process. Raise it if the store is far away.",
    )
    database_connections: Count = Field(
        default=10,
        description=(
            "PostgreSQL connections per process. Polls hold none while they wait for a mail server or the "
            "store, so fewer than `ARCHIVER_WORKERS` are enough."
        ),
    )
    lease_seconds: Annotated[float, Field(ge=5)] = Field(
        default=45.0,
        description=(
            "Time for which a crashed worker keeps its accounts from other workers. At least 5. A longer "
            "lease survives longer stalls of the database."
        ),
    )
    interval_seconds: Positive = Field(
        default=300.0,
        description=(
            "Time between two polls of an account that is added without an interval, ±10 %. The server's "
            "LOGIN-DELAY takes precedence if it is longer. Intervals are capped at 31 days."
        ),
    )
    ramp_seconds: Annotated[float, Field(ge=0)] = Field(
        default=10.0,
        description=(
            "Time in which a starting process grows from one poll to `ARCHIVER_WORKERS`, so that a restart "
            "does not flood servers with logins."
        ),
    )
    host_sessions: Count = Field(
        default=20,
        description=(
            "Sessions with one mail host at the same time, over all processes that share the database, "
            "including `archiver sync`. Raise it for your own server. Lower it if a server refuses logins "
            "because of too many sessions."
        ),
    )
    host_sessions_of: dict[str, Count] = Field(
        default={},
        description=(
            "The same for single hosts, by the host in the accounts' URLs, as JSON or a TOML table: "
            '`{"outlook.office365.com": 100}`. Use the same value in all processes.'
        ),
    )
    session_messages: Count | None = Field(
        default=None,
        description="Messages that one poll fetches at most. The account is due again immediately.",
    )
    session_bytes: Count | None = Field(
        default=None,
        description=(
            "Bytes that one poll fetches at most. The account is due again immediately. The first message "
            "is fetched regardless of its size."
        ),
    )
    day_bytes: Count | None = Field(
        default=None,
        description=(
            "Bytes that an account fetches in a day (UTC), unless it has a budget of its own. After that, "
            "polls only list the mailbox; `to_come` and a warning report what remains. Gmail locks an "
            "account for a day above about 1,250 MB: `1000000000` is safe. Bytes fetched by a killed "
            "process are not counted."
        ),
    )
    slice_seconds: Positive = Field(
        default=60.0,
        description=(
            "Time after which a poll ends if other accounts are due and find no free worker, or no free "
            "session at their host. It is due again immediately, behind them."
        ),
    )
    session_seconds: Positive = Field(
        default=1800.0,
        description=(
            "Time after which a poll of a large mailbox stops fetching, so that other accounts get their "
            "turn. It is due again immediately. A session that has not ended after twice this time is "
            "disconnected."
        ),
    )
    full_listing_seconds: Annotated[float, Field(ge=0)] = Field(
        default=4 * 3600.0,
        description=(
            "Longest time between full listings of a mailbox that looks unchanged or has only grown (four "
            "hours). 0 lists at every poll."
        ),
    )
    forbid_deletion: bool = Field(
        default=False,
        description=(
            "Delete nothing from any mail server, regardless of the accounts' policies. Use it in the "
            "first weeks, during an audit, or when in doubt."
        ),
    )
    batch_messages: Annotated[int, Field(gt=0, le=5_000)] = Field(
        default=100,
        description="Messages after which a batch is recorded.",
    )
    batch_bytes: Count = Field(
        default=32 * 1024 * 1024,
        description="Bytes after which a batch is recorded (32 MiB).",
    )
    batch_seconds: Positive = Field(
        default=10.0,
        description="Time after which a batch is recorded.",
    )
    message_bytes: Count = Field(
        default=1024 * 1024 * 1024,
        description=(
            "Largest message to fetch (1 GiB). A larger one is quarantined. If you raise the limit, its "
            "next retry fetches it."
        ),
    )
    listing_lines: Count = Field(
        default=750_000,
        description=(
            "Messages that a mailbox may list. A longer listing fails the poll. A listing takes at most 40 "
            "bytes of memory per message besides its UIDL, so the defaults keep it below 64 MB."
        ),
    )
    listing_bytes: Count = Field(
        default=32 * 1024 * 1024,
        description=(
            "Bytes that each of a mailbox's two listings, UIDL and LIST, may have (32 MiB). A longer one "
            "fails the poll."
        ),
    )
    status_line_bytes: Annotated[int, Field(ge=512, le=1024 * 1024)] = Field(
        default=8192,
        description=(
            "Bytes that one status line of a mail server may have. A longer one fails the poll. The "
            "minimum is 512, the limit of RFC 1939."
        ),
    )
    connect_seconds: Positive = Field(
        default=30.0,
        description=(
            "Time for a server to accept a connection at any of its addresses, and again for the TLS "
            "handshake."
        ),
    )
    greeting_seconds: Positive = Field(
        default=60.0,
        description="Time until the greeting. Some servers look up names first, or delay clients on purpose.",
    )
    capability_seconds: Positive = Field(
        default=20.0,
        description="Time for the answer to CAPA. If there is none, the poll reconnects without CAPA.",
    )
    login_seconds: Positive = Field(
        default=180.0,
        description="Time for the whole login. Servers wait up to two minutes for another session's lock.",
    )
    listing_seconds: Positive = Field(
        default=300.0,
        description="Time until a listing begins. A server may have to read every message for its size.",
    )
    idle_seconds: Positive = Field(
        default=60.0,
        description="Longest silence of a server at any other point.",
    )
    quit_seconds: Positive = Field(
        default=300.0,
        description="Time for the answer to QUIT. A server may rewrite a large mailbox before it answers.",
    )
    spool_directory: Path | None = Field(
        default=None,
        description=(
            "Directory for large messages that wait for their upload. Default: the system's directory for "
            "temporary files, which is often in memory. It must exist. It needs room for the largest "
            "messages, times the polls that run at the same time."
        ),
    )
    spool_memory_bytes: Count = Field(
        default=64 * 1024 * 1024,
        description=(
            "Memory for messages in transit, per process (64 MiB). Messages that do not fit go to the "
            "spool directory."
        ),
    )
    spool_message_bytes: Count = Field(
        default=1024 * 1024,
        description="Messages larger than this (1 MiB) go to the spool directory.",
    )
    drain_seconds: Positive = Field(
        default=30.0,
        description=(
            "Time after SIGTERM after which `archiver run` exits even if polls are running. Give your "
            "supervisor a longer kill timeout."
        ),
    )
    history_days: Count = Field(
        default=30,
        description=(
            "Days for which single polls are kept. After that, their daily totals and each account's "
            "latest poll remain. Set a few days if there are many accounts: 100,000 accounts make 29 "
            "million polls a day."
        ),
    )
    http_listen: str | None = Field(
        default=None,
        description=(
            "`host:port` on which `archiver run` serves `/livez`, `/readyz`, `/metrics` and `/v1`, such as "
            "`127.0.0.1:8080` or `[::]:8080`, by plain HTTP. Default: HTTP is off. Needs `pip install "
            "'archiver[web]'`."
        ),
    )
    http_hosts: Annotated[list[str], NoDecode] = Field(
        default=[],
        description=(
            "Names under which requests reach `/v1`, such as those of an ingress, without ports, separated "
            "by commas or as a TOML list. Requests to other names are refused. Always allowed: `localhost`, "
            "the host in `ARCHIVER_HTTP_LISTEN`, loopback addresses, and off loopback all addresses."
        ),
    )
    api_token: SecretStr | None = Field(
        default=None,
        description=(
            "Bearer token that requests to `/v1` must carry. Without a token, `/v1` is open on loopback "
            "addresses and refused on all others."
        ),
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info",
        description=(
            "Lowest level that `archiver run` logs: `debug`, `info`, `warning` or `error`. At `warning`, "
            "successful polls are not logged."
        ),
    )

    @field_validator("http_hosts", mode="before")
    @classmethod
    def _split(cls, given: object) -> object:
        return (
            [name.strip() for name in given.split(",") if name.strip()] if isinstance(given, str) else given
        )

    @field_validator("http_hosts")
    @classmethod
    def _are_names(cls, names: list[str]) -> list[str]:
        for name in names:
            if not _HOST.fullmatch(name):
                raise ValueError("host names without scheme, port and wildcard are needed")
        return names

    @classmethod
    def settings_customise_sources(  # the library's signature
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, _config_file())


def load() -> Settings:
    """Read the settings. Raises UsageError, which names each invalid one but never a secret's value."""
    path = _config_file()
    if path is not None and not path.is_file():
        raise UsageError(
            f"there is no configuration file {path}", hint=f"correct {CONFIG}, which names it, or unset it"
        )
    try:
        return Settings()
    except ValidationError as error:
        problems = "; ".join(_problem(found, path) for found in error.errors())
        raise UsageError(
            f"invalid settings: {problems}", hint="docs/reference/settings.md describes each setting"
        ) from None
    except ValueError as error:
        raise UsageError(f"configuration file {path}: {error}") from None


def unknown() -> list[str]:
    """Variables that look like settings but are not: most likely misspelled, or Kubernetes' service links."""
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields} | {CONFIG}
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)


def _problem(found: ErrorDetails, path: Path | None) -> str:
    name = "_".join(map(str, found["loc"]))
    if found["type"] != "extra_forbidden":
        return f"{PREFIX}{name.upper()}: {found['msg']}"
    # Only the file can have a key that is not a setting: other variables are not read.
    similar = difflib.get_close_matches(name, Settings.model_fields, n=1)
    return f"unknown key {name} in {path}" + "".join(f"; did you mean {key}?" for key in similar)


def _config_file() -> Path | None:
    name = os.environ.get(CONFIG)
    return Path(name) if name else None
