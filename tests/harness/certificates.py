"""Certificates for tests: the demo's for servers, since such servers need it, and one for clients."""

import hashlib
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from archiver.demo.certificates import self_signed

__all__ = ["certificate_sha256", "client_certificate", "key_sha256", "self_signed"]


def client_certificate(
    directory: Path, name: str = "client", *, passphrase: bytes = b""
) -> tuple[Path, Path]:
    """A client's certificate, with the authority that signed it behind it, and its key (PEM).

    A server that trusts what is in the first file accepts the client.
    """
    authority = trustme.CA()
    issued = authority.issue_cert(f"{name}.example", common_name=name)
    certificate_file, key_file = directory / f"{name}.pem", directory / f"{name}.key"
    issued.cert_chain_pems[0].write_to_path(certificate_file)
    authority.cert_pem.write_to_path(certificate_file, append=True)
    key = issued.private_key_pem.bytes()
    if passphrase:
        key = serialization.load_pem_private_key(key, None).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(passphrase),
        )
    key_file.write_bytes(key)
    return certificate_file, key_file


def certificate_sha256(file: Path) -> str:
    """The fingerprint of a certificate (PEM)."""
    return x509.load_pem_x509_certificate(file.read_bytes()).fingerprint(hashes.SHA256()).hex()


def key_sha256(file: Path) -> str:
    """The fingerprint of the public key in a certificate (PEM)."""
    key = x509.load_pem_x509_certificate(file.read_bytes()).public_key()
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()
