"""The chart as helm renders it: what the API server, Pod Security and the archiver would make of it."""

import copy
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml
from pydantic import SecretStr
from typer.core import TyperGroup

import archiver
from archiver.cli import app
from archiver.settings import PREFIX, Settings
from tests.conftest import require
from tests.harness import helm

pytestmark = pytest.mark.slow

CHART = Path(__file__).parents[2] / "helm" / "archiver"
GUIDE = CHART.parents[1] / "docs" / "how-to" / "kubernetes.md"
CASES = sorted((CHART / "ci").glob("*-values.yaml"))
KUBERNETES = "1.36"
"""Of the schemas that every object is held against."""

CUSTOM_KINDS = {"ServiceMonitor"}
"""Not Kubernetes' own: no schema of it is at hand, so a test of its own reads it."""

Object = dict[str, Any]

MINIMAL: Object = yaml.safe_load((CHART / "ci" / "minimal-values.yaml").read_text())

SECRET_SAMPLES = {
    "ARCHIVER_DATABASE_URL": "postgresql://archiver:secret@postgres/archiver",
    "ARCHIVER_SECRET_KEY": "c2l4dGVlbiBieXRlcyBhbmQgc2l4dGVlbiBtb3JlISE=",
    "ARCHIVER_API_TOKEN": "token",
}


@pytest.fixture(scope="module", autouse=True)
def _helm() -> None:
    try:
        helm.find()
    except helm.HelmMissing as missing:
        require(str(missing))


def render(values: Path, *arguments: str) -> list[Object]:
    rendered = helm.run(
        "template", "mail", CHART, "--namespace", "compliance", "--values", values, *arguments
    )
    assert rendered.returncode == 0, rendered.stderr
    return [document for document in yaml.safe_load_all(rendered.stdout) if document]


def render_with(tmp_path: Path, changes: Object, base: Object = MINIMAL) -> list[Object]:
    return render(written(tmp_path, changes, base))


def refusal(tmp_path: Path, changes: Object, base: Object = MINIMAL) -> str:
    """What helm says to values that it must not take."""
    result = helm.run("template", "mail", CHART, "--values", written(tmp_path, changes, base))
    assert result.returncode != 0, "helm took them"
    assert result.stdout == ""
    return result.stderr


def written(tmp_path: Path, changes: Object, base: Object) -> Path:
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(merged(base, changes)))
    return file


def merged(base: Object, changes: Object) -> Object:
    result = copy.deepcopy(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def one(objects: list[Object], kind: str) -> Object:
    [found] = [item for item in objects if item["kind"] == kind]
    return found


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Each pod's kind of owner and specification."""
    for item in objects:
        if item["kind"] == "Pod":
            yield "Pod", item["spec"]
        elif "template" in item.get("spec", {}):
            yield item["kind"], item["spec"]["template"]["spec"]


def pod_of(objects: list[Object], kind: str) -> Object:
    [spec] = [spec for owner, spec in pods(objects) if owner == kind]
    return spec


def environment(pod: Object) -> dict[str, Object]:
    [container] = pod["containers"]
    names = [entry["name"] for entry in container.get("env", [])]
    assert len(names) == len(set(names)), "a variable is set twice"
    return {entry["name"]: entry for entry in container.get("env", [])}


def as_json(value: object) -> str:
    """Tells 300 from 300.0, which Python calls equal."""
    return json.dumps(value, sort_keys=True)


def secret_references(node: object) -> Iterator[str]:
    """The names of all Secrets that an object mentions."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("secretKeyRef", "secretRef"):
                yield value["name"]
            elif key == "secret":
                yield value["secretName"]
            else:
                yield from secret_references(value)
    elif isinstance(node, list):
        for value in node:
            yield from secret_references(value)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name.removesuffix("-values.yaml"))
def case(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture(scope="module")
def objects(case: Path) -> list[Object]:
    return render(case)


@pytest.fixture(scope="module")
def minimal() -> list[Object]:
    return render(CHART / "ci" / "minimal-values.yaml")


@pytest.fixture(scope="module")
def full() -> list[Object]:
    return render(CHART / "ci" / "full-values.yaml")


# -- every case ------------------------------------------------------------


def test_helm_lints_it(case: Path) -> None:
    linted = helm.run("lint", "--strict", CHART, "--values", case)
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_the_api_server_knows_every_field(objects: list[Object]) -> None:
    assert {"Deployment", "Service"} <= {item["kind"] for item in objects}
    for item in objects:
        if item["kind"] not in CUSTOM_KINDS:
            kubernetes_validate.validate(item, KUBERNETES, strict=True)


def test_no_two_objects_share_a_name_and_all_lie_in_the_namespace(objects: list[Object]) -> None:
    names = [(item["kind"], item["metadata"]["name"]) for item in objects]
    assert len(names) == len(set(names))
    assert {item["metadata"]["namespace"] for item in objects} == {"compliance"}


def test_every_pod_is_restricted_and_more(objects: list[Object]) -> None:
    """Pod Security's level "restricted": https://kubernetes.io/docs/concepts/security/pod-security-standards/"""
    for _, pod in pods(objects):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & pod.keys()
        allowed = {"configMap", "emptyDir", "secret", "persistentVolumeClaim"}
        assert all((volume.keys() - {"name"}) <= allowed for volume in pod.get("volumes", []))
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert all("hostPort" not in port for port in container.get("ports", []))
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]
        assert pod["automountServiceAccountToken"] is False


def test_no_pod_meets_the_variables_of_service_links(objects: list[Object]) -> None:
    """A Service named archiver would put ARCHIVER_PORT into every container of its namespace."""
    assert [pod["enableServiceLinks"] for _, pod in pods(objects)] == [False for _ in pods(objects)]


def test_every_mount_has_its_volume_and_none_is_idle(objects: list[Object]) -> None:
    for _, pod in pods(objects):
        volumes = [volume["name"] for volume in pod.get("volumes", [])]
        mounts = [
            mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", [])
        ]
        assert sorted(volumes) == sorted(mounts)


def test_a_worker_drains_before_it_is_killed(objects: list[Object]) -> None:
    pod = pod_of(objects, "Deployment")
    drain = float(environment(pod)["ARCHIVER_DRAIN_SECONDS"]["value"])
    assert pod["terminationGracePeriodSeconds"] >= drain + 5


def test_probes_ask_for_what_each_is_about(objects: list[Object]) -> None:
    [container] = pod_of(objects, "Deployment")["containers"]
    asked = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert asked == {
        "startup": {"path": "/livez", "port": "http"},
        "liveness": {"path": "/livez", "port": "http"},
        "readiness": {"path": "/readyz", "port": "http"},
    }
    [port] = container["ports"]
    assert port["name"] == "http"
    listen = environment(pod_of(objects, "Deployment"))["ARCHIVER_HTTP_LISTEN"]["value"]
    assert listen.rpartition(":")[2] == str(port["containerPort"])


def test_everything_that_selects_workers_selects_them_alone(objects: list[Object]) -> None:
    labels = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    selectors = [one(objects, "Service")["spec"]["selector"]]
    for item in objects:
        spec = item.get("spec", {})
        if item["kind"] in ("Deployment", "PodDisruptionBudget"):
            selectors.append(spec["selector"]["matchLabels"])
        elif item["kind"] == "NetworkPolicy":
            selectors.append(spec["podSelector"]["matchLabels"])
    selectors += [
        constraint["labelSelector"]["matchLabels"]
        for constraint in pod_of(objects, "Deployment")["topologySpreadConstraints"]
    ]
    others = [item["spec"]["template"]["metadata"]["labels"] for item in objects if item["kind"] == "Job"]
    others += [item["metadata"]["labels"] for item in objects if item["kind"] == "Pod"]
    for selector in selectors:
        assert selector.items() <= labels.items()
        assert not any(selector.items() <= other.items() for other in others)


def test_the_archiver_takes_the_settings(objects: list[Object]) -> None:
    """What is rendered, a sample for each Secret, goes through the archiver's own validation."""
    variables = environment(pod_of(objects, "Deployment"))
    given = {
        name.removeprefix(PREFIX).lower(): entry.get("value", SECRET_SAMPLES.get(name))
        for name, entry in variables.items()
        if name.startswith(PREFIX)
    }
    settings = Settings.model_validate(given)
    assert settings.model_fields_set >= given.keys()
    assert isinstance(settings.http_listen, str)


def test_secrets_come_by_reference(objects: list[Object]) -> None:
    secret_settings = {
        f"{PREFIX}{name}".upper()
        for name, field in Settings.model_fields.items()
        if SecretStr in (field.annotation, *getattr(field.annotation, "__args__", ()))
    }
    assert secret_settings == {"ARCHIVER_SECRET_KEY", "ARCHIVER_API_TOKEN"}
    for _, pod in pods(objects):
        for name, entry in environment(pod).items():
            if name in secret_settings | {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}:
                assert entry["valueFrom"].keys() == {"secretKeyRef"}
    assert all(item["kind"] != "Secret" for item in objects)


def test_the_migration_needs_nothing_of_this_release(case: Path, objects: list[Object]) -> None:
    """A hook before install runs before the release's service account, ConfigMaps and policies exist."""
    values = merged(yaml.safe_load((CHART / "values.yaml").read_text()), yaml.safe_load(case.read_text()))
    jobs = [item for item in objects if item["kind"] == "Job"]
    if values["migrations"]["mode"] == "none" or values["database"]["url"].startswith("sqlite:"):
        assert jobs == []
        return
    [job] = jobs
    annotations = job["metadata"].get("annotations", {})
    is_hook = values["migrations"]["mode"] == "hook"
    assert annotations.get("helm.sh/hook") == ("pre-install,pre-upgrade" if is_hook else None)
    pod = pod_of(objects, "Job")
    assert pod["containers"][0]["args"] == ["db", "upgrade"]
    assert pod["serviceAccountName"] == "default"
    assert pod["restartPolicy"] == "Never"
    own = {item["metadata"]["name"] for item in objects if item["kind"] in ("ConfigMap", "ServiceAccount")}
    assert not any(f'"{name}"' in json.dumps(pod) for name in own)
    database = environment(pod)["ARCHIVER_DATABASE_URL"]
    assert database == environment(pod_of(objects, "Deployment"))["ARCHIVER_DATABASE_URL"]
    given_by_user = {"JANE_PASSWORD", "PGPASSWORD"}
    assert {name for name, entry in environment(pod).items() if "valueFrom" in entry} - given_by_user <= {
        "ARCHIVER_DATABASE_URL"
    }


# -- single parts ----------------------------------------------------------


def test_the_least_values_make_a_service_of_two_workers(minimal: list[Object]) -> None:
    assert sorted(item["kind"] for item in minimal) == [
        "Deployment",
        "Job",
        "Pod",
        "PodDisruptionBudget",
        "Service",
        "ServiceAccount",
    ]
    deployment = one(minimal, "Deployment")
    assert deployment["spec"]["replicas"] == 2
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    [container] = pod_of(minimal, "Deployment")["containers"]
    assert container["args"] == ["run"]
    assert container["image"] == f"registry.example.com/archiver:{archiver.__version__}"
    assert set(secret_references(minimal)) == {"archiver"}


def test_of_the_common_secret_only_what_is_always_needed_must_be_there(minimal: list[Object]) -> None:
    references = {
        name: (
            entry["valueFrom"]["secretKeyRef"]["key"],
            entry["valueFrom"]["secretKeyRef"].get("optional", False),
        )
        for name, entry in environment(pod_of(minimal, "Deployment")).items()
        if "valueFrom" in entry
    }
    assert references == {
        "ARCHIVER_DATABASE_URL": ("database-url", False),
        "ARCHIVER_SECRET_KEY": ("secret-key", False),
        "ARCHIVER_API_TOKEN": ("api-token", True),
        "AWS_ACCESS_KEY_ID": ("aws-access-key-id", True),
        "AWS_SECRET_ACCESS_KEY": ("aws-secret-access-key", True),
    }


def test_each_part_may_have_a_secret_of_its_own(full: list[Object]) -> None:
    references = {
        name: entry["valueFrom"]["secretKeyRef"]
        for name, entry in environment(pod_of(full, "Deployment")).items()
        if "valueFrom" in entry
    }
    assert references == {
        "ARCHIVER_DATABASE_URL": {"name": "postgres", "key": "uri"},
        "ARCHIVER_SECRET_KEY": {"name": "sealing", "key": "fernet"},
        "ARCHIVER_API_TOKEN": {"name": "token", "key": "bearer"},
        "AWS_ACCESS_KEY_ID": {"name": "s3", "key": "id"},
        "AWS_SECRET_ACCESS_KEY": {"name": "s3", "key": "secret"},
        "JANE_PASSWORD": {"name": "jane", "key": "password"},
    }


def test_every_setting_that_has_a_value_reaches_the_worker(full: list[Object]) -> None:
    plain = {
        name: entry["value"]
        for name, entry in environment(pod_of(full, "Deployment")).items()
        if "value" in entry
    }
    assert plain == {
        "ARCHIVER_STORE_URL": "s3://archive",
        "ARCHIVER_S3_ENDPOINT_URL": "https://s3.example.com:9000",
        "ARCHIVER_S3_REGION": "eu-central-1",
        "ARCHIVER_HTTP_LISTEN": "[::]:9090",
        "ARCHIVER_HTTP_HOSTS": (
            "mail-archiver,mail-archiver.compliance,mail-archiver.compliance.svc,"
            "mail-archiver.compliance.svc.cluster.local"
        ),
        "ARCHIVER_DRAIN_SECONDS": "110",
        "ARCHIVER_WORKERS": "64",
        "ARCHIVER_LEASE_SECONDS": "45",
        "ARCHIVER_SPOOL_DIRECTORY": "/var/spool/archiver",
        "ARCHIVER_SPOOL_MEMORY_BYTES": "16777216",
        "ARCHIVER_ACCOUNTS_FILE": "/etc/archiver/accounts/accounts.toml",
        "ARCHIVER_LOG_LEVEL": "debug",
        "ARCHIVER_BATCH_MESSAGES": "50",
    }


def test_the_accounts_file_says_what_the_values_say(full: list[Object]) -> None:
    """Quotes, backslashes and other scripts too: nothing in a value ends its string early."""
    given = yaml.safe_load((CHART / "ci" / "full-values.yaml").read_text())["accounts"]
    file = one(full, "ConfigMap")["data"]["accounts.toml"]
    assert as_json(tomllib.loads(file)) == as_json({"account": given})


def test_pods_roll_when_the_accounts_change(tmp_path: Path) -> None:
    def checksum(interval_seconds: int) -> str:
        account = {"name": "sales", "url": "pop3s://sales@pop.example.com", "password": "env:SALES"}
        values = {"accounts": [{**account, "interval_seconds": interval_seconds}]}
        template = one(render_with(tmp_path, values), "Deployment")["spec"]["template"]
        found: str = template["metadata"]["annotations"]["checksum/accounts"]
        return found

    assert checksum(300) == checksum(300)
    assert checksum(300) != checksum(600)


def test_passwords_and_certificates_are_mounted_where_the_references_point(full: list[Object]) -> None:
    pod = pod_of(full, "Deployment")
    mounts = {mount["name"]: mount for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for name, path in (
        ("accounts", "/etc/archiver/accounts"),
        ("passwords", "/etc/archiver/passwords"),
        ("ca", "/etc/archiver/ca"),
    ):
        assert mounts[name] == {"name": name, "mountPath": path, "readOnly": True}
    assert volumes["passwords"]["secret"] == {"secretName": "mailboxes", "defaultMode": 0o440}
    assert volumes["ca"]["configMap"] == {
        "name": "private-ca",
        "items": [{"key": "bundle.pem", "path": "ca.crt"}],
    }
    assert volumes["spool"] == {"name": "spool", "emptyDir": {"sizeLimit": "20Gi"}}


@pytest.mark.parametrize(
    ("case_name", "volume"),
    [
        (
            "bare",
            {
                "configMap": {
                    "name": "accounts",
                    "items": [{"key": "mailboxes.toml", "path": "accounts.toml"}],
                }
            },
        ),
        (
            "one-machine",
            {
                "secret": {
                    "secretName": "accounts",
                    "items": [{"key": "accounts.toml", "path": "accounts.toml"}],
                }
            },
        ),
    ],
)
def test_an_accounts_file_of_ones_own(case_name: str, volume: Object) -> None:
    pod = pod_of(render(CHART / "ci" / f"{case_name}-values.yaml"), "Deployment")
    assert {"name": "accounts", **volume} in pod["volumes"]
    path = environment(pod)["ARCHIVER_ACCOUNTS_FILE"]["value"]
    assert path == "/etc/archiver/accounts/accounts.toml"


def test_one_machine_keeps_all_on_its_volume_and_never_runs_twice() -> None:
    objects = render(CHART / "ci" / "one-machine-values.yaml")
    deployment = one(objects, "Deployment")
    assert deployment["spec"]["replicas"] == 1
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    pod = pod_of(objects, "Deployment")
    assert {"name": "data", "persistentVolumeClaim": {"claimName": "archive"}} in pod["volumes"]
    assert {"name": "data", "mountPath": "/var/lib/archiver"} in pod["containers"][0]["volumeMounts"]


def test_a_digest_wins_over_the_tag() -> None:
    pod = pod_of(render(CHART / "ci" / "iam-values.yaml"), "Deployment")
    assert re.fullmatch(r"registry\.example\.com/archiver@sha256:[0-9a-f]{64}", pod["containers"][0]["image"])


def test_a_plain_migration_job_has_a_new_name_for_each_image_only(tmp_path: Path) -> None:
    def name(tag: str, replicas: int) -> str:
        values = {"migrations": {"mode": "job"}, "image": {"tag": tag}, "replicaCount": replicas}
        found: str = one(render_with(tmp_path, values), "Job")["metadata"]["name"]
        return found

    assert name("1", 2) == name("1", 3)
    assert name("1", 2) != name("2", 2)


def test_the_network_policy_lets_out_what_is_named_and_no_more(full: list[Object]) -> None:
    policy = one(full, "NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    ports = [[port["port"] for port in rule["ports"]] for rule in policy["egress"]]
    assert ports == [[53, 53], [995], [5432]]
    [ingress] = policy["ingress"]
    assert ingress["ports"] == [{"port": "http", "protocol": "TCP"}]
    monitoring, test_pod = ingress["from"]
    assert monitoring == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    assert test_pod["podSelector"]["matchLabels"].items() <= one(full, "Pod")["metadata"]["labels"].items()


def test_the_monitor_finds_the_service(full: list[Object]) -> None:
    monitor, service = one(full, "ServiceMonitor"), one(full, "Service")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    [endpoint] = monitor["spec"]["endpoints"]
    assert endpoint["path"] == "/metrics"
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]


def test_a_long_release_name_still_makes_names() -> None:
    rendered = helm.run("template", "a" * 53, CHART, "--values", CHART / "ci" / "minimal-values.yaml")
    assert rendered.returncode == 0, rendered.stderr
    names = [item["metadata"]["name"] for item in yaml.safe_load_all(rendered.stdout)]
    assert max(map(len, names)) <= 63


# -- what is refused -------------------------------------------------------

IMAGE_ONLY: Object = {"image": {"repository": "registry.example.com/archiver"}}


def test_all_that_is_missing_is_told_at_once(tmp_path: Path) -> None:
    said = refusal(tmp_path, {}, base={})
    assert "image.repository is not set" in said
    assert "no database: set existingSecret or database.existingSecret" in said
    assert "store.url is not set" in said


ACCOUNT = {"name": "sales", "url": "pop3s://sales@pop.example.com", "password": "env:SALES"}
SQLITE = {"existingSecret": "", "database": {"url": "sqlite:////var/lib/archiver/archiver.db"}}
DIRECTORY = {"store": {"url": "file:/var/lib/archiver/store"}}
CLAIM = {"persistence": {"existingClaim": "archive"}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"existingSecret": ""}, "no database"),
        ({"store": {"url": ""}}, "store.url is not set"),
        ({**SQLITE, **CLAIM}, "database.url is SQLite, which replicas cannot share: set replicaCount to 1"),
        (
            {**DIRECTORY, **CLAIM},
            "store.url is a directory, which replicas cannot share: set replicaCount to 1",
        ),
        ({**SQLITE, "replicaCount": 1}, "persistence.existingClaim is not set"),
        ({**DIRECTORY, "replicaCount": 1}, "persistence.existingClaim is not set"),
        (
            {**CLAIM, "database": {"url": "sqlite:///archiver.db"}, "replicaCount": 1},
            "database.url is outside the volume",
        ),
        ({**CLAIM, "store": {"url": "file:/srv"}, "replicaCount": 1}, "store.url is outside the volume"),
        (
            {"database": {"url": "postgresql://archiver:hunter2@postgres/archiver"}},
            "database.url contains a password",
        ),
        (
            {"database": {"url": "postgresql://postgres/archiver?user=a&password=hunter2"}},
            "database.url contains a password",
        ),
        (
            {"database": {"url": "postgresql://postgres/archiver", "existingSecret": "postgres"}},
            "database.url and database.existingSecret are both set",
        ),
        ({"accounts": [ACCOUNT], "accountsExistingSecret": "accounts"}, "exclude each other"),
        ({"database": {"url": "mysql://hunter2@host/name"}}, "database.url is invalid"),
        ({"accounts": [{**ACCOUNT, "password": "hunter2"}]}, 'the password of "sales" is not a reference'),
        ({"accounts": [{**ACCOUNT, "url": "pop3s://u:hunter2@h"}]}, 'the url of "sales" is not like'),
        ({"accounts": [ACCOUNT, ACCOUNT]}, 'accounts: "sales" occurs twice'),
        (
            {"accounts": [{**ACCOUNT, "password": "file:/etc/archiver/passwords/sales"}]},
            "mailboxSecret is not set",
        ),
        (
            {"accounts": [{**ACCOUNT, "client_certificate": "/etc/archiver/passwords/sales.pem"}]},
            'the client_certificate of "sales" is a file under /etc/archiver/passwords, but mailboxSecret',
        ),
        (
            {"accounts": [{**ACCOUNT, "ca_file": "/etc/archiver/ca/ca.crt"}]},
            "caBundle.existingConfigMap is not set",
        ),
        (
            {"settings": {"ARCHIVER_WORKERS": "4"}},
            "settings: ARCHIVER_WORKERS has its own value in the chart: use worker.concurrency",
        ),
        ({"extraEnv": [{"name": "ARCHIVER_API_TOKEN", "value": "hunter2"}]}, "use apiToken"),
    ],
)
def test_values_that_do_not_go_together(tmp_path: Path, changes: Object, sentence: str) -> None:
    said = refusal(tmp_path, changes)
    assert sentence in said
    assert "hunter2" not in said


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"replicas": 3}, "replicas"),
        ({"replicaCount": "three"}, "/replicaCount"),
        ({"image": {"digest": "latest"}}, "/image/digest"),
        ({"store": {"url": "https://bucket"}}, "/store/url"),
        ({"worker": {"drainSeconds": 0}}, "/worker/drainSeconds"),
        ({"worker": {"drainMarginSeconds": 0}}, "/worker/drainMarginSeconds"),
        ({"worker": {"concurency": 4}}, "concurency"),
        ({"settings": {"WORKERS": "4"}}, "WORKERS"),
        ({"settings": {"ARCHIVER_MESSAGE_BYTES": 268435456}}, "/settings/ARCHIVER_MESSAGE_BYTES"),
        ({"migrations": {"mode": "always"}}, "/migrations/mode"),
        ({"accounts": [{"name": "a", "url": "pop3s://u@h"}]}, "password"),
        ({"accounts": [{**ACCOUNT, "delete": "always"}]}, "/accounts/0/delete"),
        ({"accounts": [{**ACCOUNT, "tls": False}]}, "/accounts/0/tls"),
        ({"accounts": [{**ACCOUNT, "tls_minimum": "0.9"}]}, "/accounts/0/tls_minimum"),
        ({"accounts": [{**ACCOUNT, "tls_pins": ["abc"]}]}, "/accounts/0/tls_pins/0"),
        ({"accounts": [{**ACCOUNT, "client_key": "/etc/key"}]}, "/accounts/0"),
        ({"accounts": [{**ACCOUNT, "name": "a\nb"}]}, "/accounts/0/name"),
        ({"logLevel": "verbose"}, "/logLevel"),
        ({"spool": {"sizeLimit": "much"}}, "/spool/sizeLimit"),
        ({"networkPolicy": {"egressPorts": ["https"]}}, "/networkPolicy/egressPorts/0"),
    ],
)
def test_the_schema_refuses_what_no_value_may_be(tmp_path: Path, changes: Object, place: str) -> None:
    said = refusal(tmp_path, changes)
    assert "schema" in said
    assert place in said.replace(".", "/")


# -- the chart and what lies beside it -------------------------------------


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == archiver.__version__


def test_values_and_schema_name_the_same_things() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def compare(values: Object, node: Object, place: str) -> None:
        node = schema["definitions"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node
        if node.get("additionalProperties") is not False:
            return
        shown = values.keys() | {"global"} if place == "" else values.keys()
        optional = {"claims", "successThreshold", "initialDelaySeconds"}
        assert set(node["properties"]) - optional == shown, place or "values.yaml"
        for name, value in values.items():
            if isinstance(value, dict):
                compare(value, node["properties"][name], f"{place}.{name}")

    compare(yaml.safe_load((CHART / "values.yaml").read_text()), schema, "")


@pytest.mark.parametrize("page", [CHART / "templates" / "NOTES.txt", GUIDE], ids=lambda page: page.name)
def test_every_command_that_a_page_gives_exists(page: Path) -> None:
    given = re.findall(r"(?:-- (?:\\\n\s+)?|`)archiver ([a-z]+)(?: ([a-z]+))?", page.read_text())
    assert len(given) > 5
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    for name, subcommand in given:
        assert name in root.commands, name
        command = root.commands[name]
        if isinstance(command, TyperGroup):
            assert subcommand in command.commands, f"{name} {subcommand}"


def test_the_settings_that_have_values_are_the_archivers() -> None:
    owned = set(re.findall(r'"(ARCHIVER_\w+)" "', (CHART / "templates" / "_validate.tpl").read_text()))
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields}
    rendered = set(re.findall(r"ARCHIVER_[A-Z0-9_]+", (CHART / "templates" / "_helpers.tpl").read_text()))
    assert owned <= known
    assert rendered - {"ARCHIVER_PORT"} == owned


@pytest.mark.parametrize(
    ("case_name", "sentences"),
    [
        ("minimal", ["The migration ran before", "archiver account add", "archiver status"]),
        ("iam", ["The migration is running", "There is no API token"]),
        ("full", ["4 account(s) are applied", "archiver account check 'sales'"]),
        ("bare", ['migrations.mode is "none"', "archiver db upgrade", "There is no sealing key"]),
        ("one-machine", ["The worker upgrades SQLite", "accounts of your file"]),
    ],
)
def test_the_notes_say_what_to_do_next(case_name: str, sentences: list[str]) -> None:
    values = CHART / "ci" / f"{case_name}-values.yaml"
    shown = helm.run(
        "install", "mail", CHART, "--dry-run=client", "--namespace", "compliance", "--values", values
    )
    assert shown.returncode == 0, shown.stderr
    notes = shown.stdout.partition("NOTES:")[2]
    assert all(sentence in notes for sentence in sentences)
    deployment = one(render(values), "Deployment")["metadata"]["name"]
    assert f"kubectl --namespace compliance exec deploy/{deployment} -- archiver status" in notes
