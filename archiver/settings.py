"""The settings: ``ARCHIVER_*`` variables, over an optional TOML file, over defaults that suit one machine.

Only the command line and the composition root see this module; all else is
given plain values. Every setting is described in docs/reference/settings.md, and a test
compares the two.
"""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from archiver.errors import UsageError

PREFIX = "ARCHIVER_"
CONFIG = f"{PREFIX}CONFIG"
"""Names the TOML file."""

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


class Settings(BaseSettings):
    """What an operator can set. A field's name in upper case, behind ``ARCHIVER_``, is its variable."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", hide_input_in_errors=True)

    database_url: str = Field(
        default="sqlite:///archive/archiver.db",
        description="sqlite:///path, or postgresql://user@host/name",
    )
    store_url: str = Field(default="file:archive/store", description="file:path, or s3://bucket/prefix")
    s3_endpoint_url: str | None = Field(
        default=None, description="the S3-compatible server; unset for Amazon's own"
    )
    s3_region: str | None = Field(default=None, description="the bucket's region; unset asks the AWS_* chain")
    secret_key: SecretStr | None = Field(
        default=None,
        description="seals the passwords kept in the database; NEW,OLD while it is being changed",
    )
    accounts_file: Path | None = Field(
        default=None, description="TOML file of accounts, brought into the database when run starts"
    )
    workers: Count = Field(default=32, description="polls at once in this process")
    uploads: Count = Field(default=16, description="uploads at once in this process")
    database_connections: Count = Field(
        default=10, description="connections to PostgreSQL at most, in this process"
    )
    lease_seconds: Annotated[float, Field(ge=5)] = Field(
        default=45.0, description="how long a worker that died keeps an account from the others"
    )
    interval_seconds: Positive = Field(
        default=300.0, description="between polls of an account that names no interval"
    )
    ramp_seconds: Annotated[float, Field(ge=0)] = Field(
        default=10.0, description="after the start, until this process polls as much at once as it may"
    )
    host_sessions: Count = Field(
        default=20, description="sessions with one mail host at once, over all processes"
    )
    host_sessions_of: dict[str, Count] = Field(
        default={}, description="the same for single hosts, as JSON or a TOML table"
    )
    session_messages: Count | None = Field(default=None, description="that one poll fetches at most")
    session_bytes: Count | None = Field(default=None, description="that one poll fetches at most")
    day_bytes: Count | None = Field(
        default=None, description="fetched for an account in a day (UTC), where it names no budget of its own"
    )
    slice_seconds: Positive = Field(
        default=60.0, description="after which a poll makes room for accounts that are due and find none"
    )
    session_seconds: Positive = Field(
        default=1800.0, description="after which a poll of a large mailbox makes room for others"
    )
    full_listing_seconds: Annotated[float, Field(ge=0)] = Field(
        default=4 * 3600.0,
        description="at most, for which an unchanged mailbox is not listed whole; 0 lists at every poll",
    )
    forbid_deletion: bool = Field(
        default=False, description="delete nothing from any mail server, whatever the accounts say"
    )
    batch_messages: Annotated[int, Field(gt=0, le=5_000)] = Field(
        default=100, description="messages after which a batch is recorded"
    )
    batch_bytes: Count = Field(default=32 * 1024 * 1024, description="octets after which a batch is recorded")
    batch_seconds: Positive = Field(default=10.0, description="seconds after which a batch is recorded")
    message_bytes: Count = Field(
        default=1024 * 1024 * 1024, description="a larger message is quarantined, not fetched"
    )
    listing_lines: Count = Field(default=750_000, description="messages that a mailbox may list")
    listing_bytes: Count = Field(
        default=32 * 1024 * 1024, description="octets that each of a mailbox's two listings may have"
    )
    status_line_bytes: Annotated[int, Field(ge=512, le=1024 * 1024)] = Field(
        default=8192, description="octets that a mail server's status line may have; RFC 1939 allows 512"
    )
    connect_seconds: Positive = Field(
        default=30.0, description="for a mail server to take the connection, and again for TLS"
    )
    greeting_seconds: Positive = Field(default=60.0, description="for a mail server to greet")
    capability_seconds: Positive = Field(
        default=20.0, description="for an answer to CAPA; without one the server is called again without CAPA"
    )
    login_seconds: Positive = Field(default=180.0, description="for a login as a whole")
    listing_seconds: Positive = Field(default=300.0, description="until a listing begins")
    idle_seconds: Positive = Field(
        default=60.0, description="that a mail server may be silent, in the middle of anything else"
    )
    quit_seconds: Positive = Field(
        default=300.0, description="for a mail server to delete, after QUIT, what it was asked to"
    )
    spool_directory: Path | None = Field(
        default=None, description="where large messages wait for their upload; unset takes the system's"
    )
    spool_memory_bytes: Count = Field(
        default=64 * 1024 * 1024, description="memory for messages on their way, in this process"
    )
    spool_message_bytes: Count = Field(
        default=1024 * 1024, description="a larger message goes to the spool directory"
    )
    drain_seconds: Positive = Field(
        default=30.0, description="after SIGTERM, until run ends whatever happens"
    )
    history_days: Count = Field(
        default=30, description="days for which each poll is kept; after that, what each day adds up to"
    )
    http_listen: str | None = Field(
        default=None, description="host:port of /livez, /readyz, /metrics and /v1; unset serves none"
    )
    api_token: SecretStr | None = Field(
        default=None, description="bearer token that /v1 demands; needed unless it listens on loopback"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="of run's log"
    )

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
    """Read the settings. Raises UsageError that names each wrong one, and never what a secret one held."""
    path = _config_file()
    if path is not None and not path.is_file():
        raise UsageError(f"there is no configuration file {path}", hint="ARCHIVER_CONFIG names one")
    try:
        return Settings()
    except ValidationError as error:
        wrong = "; ".join(
            f"{PREFIX}{'_'.join(map(str, found['loc'])).upper()}: {found['msg']}" for found in error.errors()
        )
        raise UsageError(
            f"wrong settings: {wrong}", hint="docs/reference/settings.md tells what each may be"
        ) from None
    except ValueError as error:
        raise UsageError(f"configuration file {path}: {error}") from None


def unknown() -> list[str]:
    """Variables that look like settings and are none: most likely misspelt, or Kubernetes' service links."""
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields} | {CONFIG}
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)


def _config_file() -> Path | None:
    name = os.environ.get(CONFIG)
    return Path(name) if name else None
