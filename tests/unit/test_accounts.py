"""An account's settings: named once, and the same in every place that names them."""

import json
import re
import tomllib
from dataclasses import fields as fields_of
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from archiver.accounts import fields, file, rules
from archiver.accounts.fields import FIELDS, Group
from archiver.cli import app
from archiver.db.account_columns import account_of, columns_of, settings_of
from archiver.db.tables import AccountRow
from archiver.errors import UsageError
from archiver.model import Account, DeletePolicy
from archiver.states import AccountState
from tests.harness import chart_schema

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "archiver"
PIN = "ab" * 32
URL = "pop3s://sales@pop.example.com"

SAMPLES: dict[str, tuple[Any, Any]] = {
    "name": ("sales", "sales"),
    "url": (URL, URL),
    "password": ("oauth:file:/etc/sales.json", "oauth:file:/etc/sales.json"),
    "tls": ("implicit", "implicit"),
    "ca_file": ("/etc/ca.pem", "/etc/ca.pem"),
    "tls_pins": ([PIN.upper(), "00" * 32], ("00" * 32, PIN)),
    "tls_minimum": ("1.0", "1.0"),
    "tls_server_name": ("old.example.com", "old.example.com"),
    "client_certificate": ("/etc/c.pem", "/etc/c.pem"),
    "client_key": ("/etc/c.key", "/etc/c.key"),
    "timeout_seconds": (90, 90.0),
    "delete": ("after-days=30", DeletePolicy(30.0)),
    "interval_seconds": (60, 60.0),
    "interval_max_seconds": (3600.5, 3600.5),
    "cron": ("30 2 * * 1-5", "30 2 * * 1-5"),
    "time_zone": ("Europe/Berlin", "Europe/Berlin"),
    "blackout": ("Sat 22:00-02:00", "Sat 22:00-02:00"),
    "day_bytes": (20_000_000_000, 20_000_000_000),
}
"""For each field a value as the accounts file has it, and as an account does."""


def written(values: dict[str, Any]) -> str:
    """An accounts file of one account: a JSON value is a TOML one here."""
    return "[[account]]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def account_in(path: Path, values: dict[str, Any]) -> Account:
    path.write_text(written(values))
    [entry] = file.read(path)
    return file.account_of(entry, 300.0)


def full_account(tmp_path: Path) -> Account:
    return account_in(tmp_path / "accounts.toml", {name: given for name, (given, _) in SAMPLES.items()})


# One list, and every place that must have the same


def test_every_setting_has_a_sample_that_differs_from_its_default() -> None:
    assert list(SAMPLES) == [field.name for field in FIELDS]
    for field in FIELDS:
        given, kept = SAMPLES[field.name]
        assert field.kind.read(given) == kept
        assert kept != fields.DEFAULTS.get(field.name)


def test_an_account_has_every_setting_and_no_other() -> None:
    own = {"id", "epoch", "state", "state_reason", "avoids", "deletion_suspended"}
    assert {field.attribute for field in FIELDS} == {field.name for field in fields_of(Account)} - own


def test_the_database_keeps_every_value_of_an_account(tmp_path: Path) -> None:
    account = replace(full_account(tmp_path), state=AccountState.PAUSED, avoids=("UIDL", "CAPA"), epoch=3)
    row = AccountRow(**columns_of(account))
    assert account_of(row) == account
    assert columns_of(account).keys() == AccountRow.model_fields.keys() - {"created_at", "removed_at"}
    assert columns_of(account).keys() - settings_of(account).keys() == {
        *("id", "name", "epoch", "state", "state_reason", "deletion_suspended")
    }


def test_the_accounts_file_has_every_setting(tmp_path: Path) -> None:
    account = full_account(tmp_path)
    for field in FIELDS:
        assert getattr(account, field.attribute) == SAMPLES[field.name][1]
    least = {name: SAMPLES[name][0] for name in ("name", "url", "password")}
    bare = account_in(tmp_path / "accounts.toml", least)
    assert {name: getattr(bare, name) for name in fields.DEFAULTS} == fields.DEFAULTS


def test_json_has_every_setting_in_the_words_of_the_accounts_file(tmp_path: Path) -> None:
    account = full_account(tmp_path)
    shown = json.loads(json.dumps(fields.as_json(account)))
    again = {name: SAMPLES[name][0] for name in ("name", "url", "password")} | shown
    assert replace(account_in(tmp_path / "accounts.toml", again), id=account.id) == account


def options(*names: str) -> set[str]:
    command: Any = typer.main.get_command(app)
    for name in names:
        command = command.commands[name]
    return {flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")}


def test_commands_have_an_option_for_every_setting() -> None:
    def flags(*groups: Group) -> set[str]:
        return {field.flag for field in FIELDS if field.group in groups}

    everything = flags(*Group) - flags(Group.ADDRESS)
    passwords = {"--password-file", "--password-env", "--password-stdin"}
    assert options("account", "add") == everything | passwords | {"--json"}
    assert options("account", "edit") == everything | passwords | {"--url", "--forget-quirks"}
    assert options("sync") == flags(Group.CONNECTION, Group.DELETION) | passwords | {"--json"}
    assert options("account", "check") == flags(Group.CONNECTION) | passwords | {"--json"}


def test_the_chart_takes_what_the_accounts_file_takes() -> None:
    """``python -m tests.harness.chart_schema`` brings the schema up to date."""
    text = chart_schema.SCHEMA.read_text()
    assert json.loads(text)["definitions"]["account"] == fields.schema()
    assert chart_schema.rewritten(text) == text
    for name, schema in fields.schema()["properties"].items():
        jsonschema.validate(SAMPLES[name][0], schema)


def test_the_values_describe_every_setting_and_a_case_has_it() -> None:
    described = (CHART / "values.yaml").read_text()
    for field in FIELDS:
        assert re.search(rf"^#\s+(- )?{field.name}: ", described, re.MULTILINE), field.name
    cases = yaml.safe_load((CHART / "ci" / "full-values.yaml").read_text())["accounts"]
    assert {name for account in cases for name in account} == {field.name for field in FIELDS}


def test_the_archiver_takes_what_the_chart_takes(tmp_path: Path) -> None:
    path = tmp_path / "accounts.toml"
    cases = yaml.safe_load((CHART / "ci" / "full-values.yaml").read_text())["accounts"]
    path.write_text("\n".join(written(account) for account in cases))
    assert [file.account_of(entry, 300.0).name for entry in file.read(path)] == [
        account["name"] for account in cases
    ]


def test_the_documentation_shows_every_setting() -> None:
    page = (ROOT / "docs" / "reference" / "settings.md").read_text()
    [sample] = [
        block
        for block in re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        if "[[account]]" in block
    ]
    shown = {name for account in tomllib.loads(sample)["account"] for name in account}
    assert shown == {field.name for field in FIELDS}


# Values, and what they must agree on


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "a\x1b[2J"}, "printable"),
        ({"name": " "}, "empty"),
        ({"name": "pop3s://a@b"}, "not a URL"),
        ({"password": "sesame"}, "file:/path or env:NAME"),
        ({"password": ["sesame"]}, "as a string"),
        ({"url": "pop3s://sales:sesame@pop.example.com"}, "password by prompt"),
        ({"tls": "ssl"}, "implicit, starttls or none"),
        ({"tls": "none"}, "implicit"),
        ({"tls_pins": PIN}, "a list of strings"),
        ({"tls_pins": ["abc"]}, "64 hex digits"),
        ({"tls_minimum": 1.2}, "1.2 or 1.3"),
        ({"client_key": "/etc/c.key"}, "needs a client certificate"),
        ({"delete": "always"}, "never, after-archived or after-days=N"),
        ({"interval_seconds": "300"}, "a number of seconds"),
        ({"interval_seconds": True}, "a number of seconds"),
        ({"interval_seconds": 0}, "at least 1"),
        ({"day_bytes": 1.5}, "a whole number of bytes"),
        ({"day_bytes": 0}, "above 0"),
        ({"cron": "0 6 * *"}, "five fields"),
        ({"interval_max_seconds": 60}, "shorter"),
    ],
)
def test_an_unusable_value_is_named_with_its_place(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "accounts.toml"
    with pytest.raises(UsageError) as caught:
        account_in(path, {"name": "sales", "url": URL, "password": "env:P"} | change)
    said = str(caught.value)
    assert says in said
    assert said.startswith(f"{path}: entry 1 (")
    assert said.isprintable()
    assert "sesame" not in said


def test_time_without_end_is_no_number_of_seconds() -> None:
    for value in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="at least 1"):
            fields.BY_NAME["timeout_seconds"].kind.read(value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            written({"name": "a", "url": URL, "password": "env:P"})
            + written({"name": "sales", "url": URL, "pasword": "env:P"}),
            'entry 2 ("sales", line 5): no password; unknown key pasword (did you mean password?)',
        ),
        ('[[account]]\nurl = "x"\n', "entry 1 (line 1): no name; no password"),
        ('[account]\nname = "a"\n', "each account is a table [[account]]"),
        ('[[acount]]\nname = "a"\n', "unknown key 'acount'"),
        ("[[account]\n", "is not TOML"),
    ],
)
def test_a_file_that_is_wrong_says_where(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "accounts.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        file.read(path)
    assert says in str(caught.value)
    assert caught.value.hint


def test_a_new_certificate_drops_the_old_key_and_a_new_url_the_old_tls() -> None:
    account = rules.changed(
        Account("0", "a", "", "", ""),
        {"url": URL, "client_certificate": "/etc/a.pem", "client_key": "/etc/a.key"},
    )
    assert rules.changed(account, {"client_certificate": "/etc/b.pem"}).client_key is None
    assert rules.changed(account, {"client_key": "/etc/b.key"}).client_certificate == "/etc/a.pem"
    plain = rules.changed(account, {"url": "pop3://a@h", "tls": "none"})
    assert (plain.url, plain.tls) == ("pop3://a@h", "none")
    assert rules.changed(plain, {"url": "pop3://b@h"}).tls == "starttls"
    assert rules.changed(plain, {"cron": "0 6 * * *"}).tls == "none"
