"""Sample mail: seeded, business-like, and as irregular as real mail.

Owns the generation of RFC 822 messages as bytes. It promises:

- the same arguments give the same bytes, on any machine and at any time;
- a corpus with a smaller ``count`` is the beginning of a larger one;
- no two messages of a corpus are equal;
- every line ends with CRLF, including the last one.

Messages are written by hand, because libraries write correct mail only, and
real mail is not. Three of four messages are common: plain text, text with HTML,
text with attachments. Every fourth message is the next of a list of oddities, so
4 * 13 messages contain each of them:

- 8-bit text in several charsets, also wrongly declared;
- lines that begin with dots, and lines far beyond RFC 5322's 998 octets;
- no Message-ID; no Subject; only a header, with and without the blank line;
- a message within a message; S/MIME; mailing lists;
- raw 8-bit and encoded header fields.
"""

import binascii
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime

__all__ = ["corpus"]

# Sizes of business mail: most are small, a few heavy ones make the volume.
_MEDIAN_OCTETS = 15_000
_MEAN_OCTETS = 75_000
_SIGMA = math.sqrt(2 * math.log(_MEAN_OCTETS / _MEDIAN_OCTETS))  # of a log-normal with these two
_MAX_OCTETS = 8_000_000

_DIFFERENT_LINES = 2_000
_LINE_OCTETS = 72
_TEXT_OCTETS = 60_000  # people do not write more; larger messages have attachments
_ATTACHED_FROM_OCTETS = 8_000
_BASE64_COLUMNS = 76
_BASE64_GROWTH = 78 / 57  # 57 octets become a line of 76 and its CRLF
_LONG_LINE_OCTETS = (1_000, 5_000, 100_000)
_COPIED_SHARE, _ANSWERED_SHARE = 0.3, 0.5  # of all messages
_THREADS_KEPT, _REFERENCES_KEPT = 20, 10
_ZONES = [timezone(timedelta(hours=hours)) for hours in (-5, 0, 1, 9)]
_FIRST_DATE = datetime(2024, 1, 8, 7, 30, tzinfo=UTC)

_PEOPLE = (
    ("Anna Berger", "anna.berger@contoso.example"),
    ("Tomás Ibáñez", "tomas.ibanez@contoso.example"),
    ("Priya Raman", "priya.raman@contoso.example"),
    ("O'Neill, Sean", "sean.oneill@fabrikam.example"),
    ("Łukasz Wójcik", "l.wojcik@fabrikam.example"),
    ("佐藤 健", "sato@initech.example"),
    ("Accounts Payable", "invoices@contoso.example"),
    ("Мария Иванова", "m.ivanova@globex.example"),
    ("Jürgen Groß", "juergen.gross@globex.example"),
    ("Help Desk", "support@initech.example"),
)
_TOPICS = (
    "Invoice {n} for {month}",
    "Draft contract, version {n}",
    "Minutes of the steering committee, {month}",
    "Purchase order {n}",
    "Quarterly figures and forecast",
    "Delivery {n} is late",
    "Offer for {n} units",
    "Travel expenses, {month}",
    "Audit request {n}",
    "Maintenance window on Saturday",
)
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September")
_PROSE = (
    "please find attached the signed copy of our agreement and confirm receipt by Friday as discussed "
    "with the finance department the figures for this quarter are higher than expected because delivery "
    "was moved to next month we propose a call on Tuesday to settle open questions about warranty price "
    "volume discount and the schedule for acceptance tests kind regards from the project office let me "
    "know whether legal has reviewed clause seven before it goes to the board for approval"
)
_TEXT_PLAIN = b"Content-Type: text/plain; charset=us-ascii\r\nContent-Transfer-Encoding: 7bit\r\n\r\n"
_ASN1_SEQUENCE = b"\x30\x82\x0b\x2a"  # what CMS structures begin with
_FOREIGN = (
    # charset, text in it: what people write where ASCII does not do
    ("iso-8859-1", "Sehr geehrte Damen und Herren, anbei die Rechnung über 1.200 für März. Schöne Grüße"),
    ("iso-8859-2", "Dzień dobry, w załączniku przesyłam umowę. Proszę o podpis. Łódź, środa"),
    ("windows-1252", "Der Preis beträgt 1.200 \u20ac \u2013 wie \u201ebesprochen\u201c \u2026 Prüfung läuft"),
    ("koi8-r", "Добрый день! Высылаем счёт за январь. Ждём оплату, бухгалтерия"),
    ("iso-2022-jp", "お世話になっております。請求書を送付いたします。"),
    ("shift_jis", "お世話になっております。見積書をご確認ください。"),
    ("gb18030", "您好。附件是本季度的合同草案。请查收。"),
    ("utf-8", "Grüße, привет, 你好, こんにちは \U0001f4ce siehe Anhang"),
)
_ATTACHMENTS = (
    # name, type, first octets
    ("invoice-{n}.pdf", "application/pdf", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n"),
    (
        "forecast-{n}.xlsx",
        "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
        b"PK\x03\x04\x14\x00\x06\x00\x08\x00\x00\x00!\x00",
    ),
    ("scan-{n}.png", "image/png", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"),
)


def corpus(count: int, seed: int, *, scale: float = 1.0) -> Iterator[bytes]:
    """``count`` different messages, each made when it is requested.

    At ``scale`` 1 the median is about 15 kB, the mean about 75 kB, and the
    largest message about 8 MB. ``scale`` multiplies these sizes. A header and a
    few lines are the least. The oddities with long lines do not scale.
    """
    author = _Author(random.Random(seed), scale)  # noqa: S311 - reproducible on purpose
    for index in range(count):
        yield author.write(index)


class _Author:
    """Writes one message after another.

    A content is a MIME entity: its header fields, a blank line, its body.
    """

    def __init__(self, rng: random.Random, scale: float) -> None:
        self._rng = rng
        self._scale = scale
        self._now = _FIRST_DATE
        self._threads: list[_Thread] = []
        self._words = _PROSE.split()
        self._lines = [self._sentence() for _ in range(_DIFFERENT_LINES)]
        self._common = (self._plain, self._with_html, self._reply)
        self._oddities = (
            self._rightly_declared,
            self._wrongly_declared,
            self._dots,
            self._long_lines,
            self._no_message_id,
            self._no_subject,
            self._no_body,
            self._no_blank_line,
            self._forwarded,
            self._signed,
            self._encrypted,
            self._mailing_list,
            self._raw_header,
        )

    def write(self, index: int) -> bytes:
        """The message at this place; places are asked for in their order."""
        turn, place = divmod(index, len(self._common) + 1)
        kind = (*self._common, self._oddities[turn % len(self._oddities)])[place]
        size = min(self._rng.lognormvariate(math.log(_MEDIAN_OCTETS), _SIGMA), _MAX_OCTETS)
        octets = int(size * self._scale)
        fields = self._envelope(index)
        content = kind(fields, min(octets, _TEXT_OCTETS))
        header = b"".join(name.encode() + b": " + value + b"\r\n" for name, value in fields.items())
        return header + self._heavier(content, octets - len(header) - len(content))

    def _envelope(self, index: int) -> dict[str, bytes]:
        """The header fields but those of the content. ``Received`` makes every message differ from others."""
        rng = self._rng
        self._now += timedelta(seconds=rng.randrange(20, 4_000))
        sender, recipient, copied = rng.sample(_PEOPLE, 3)
        date = format_datetime(self._now.astimezone(rng.choice(_ZONES)))
        host = sender[1].partition("@")[2]
        message_id = f"<{self._token()}.{index}@{host}>"
        fields = {
            "Return-Path": f"<{sender[1]}>",
            "Received": f"from mail.{host} (mail.{host} [192.0.2.{rng.randrange(1, 255)}])\r\n"
            f"\tby mx.contoso.example with ESMTPS id {self._token()}.{index}\r\n"
            f"\tfor <{recipient[1]}>; {date}",
            "Message-ID": message_id,
            "Date": date,
            "From": _mailbox(*sender),
            "To": _mailbox(*recipient),
        }
        if rng.random() < _COPIED_SHARE:
            fields["Cc"] = _mailbox(*copied)
        if self._threads and rng.random() < _ANSWERED_SHARE:
            thread = rng.choice(self._threads)
            fields["Subject"] = f"Re: {thread.topic}"
            fields["In-Reply-To"] = thread.message_ids[-1]
            fields["References"] = "\r\n\t".join(thread.message_ids[-_REFERENCES_KEPT:])
            thread.message_ids.append(message_id)
        else:
            topic = rng.choice(_TOPICS).format(n=rng.randrange(1_000, 99_999), month=rng.choice(_MONTHS))
            fields["Subject"] = topic
            self._threads = [*self._threads[1 - _THREADS_KEPT :], _Thread(topic, [message_id])]
        fields["MIME-Version"] = "1.0"
        return {name: value.encode() for name, value in fields.items()}

    def _heavier(self, content: bytes, octets: int) -> bytes:
        """The content with attachments that weigh about this much, when that and the content are enough."""
        if octets < _ATTACHED_FROM_OCTETS or len(content) <= len(b"\r\n"):
            return content
        parts = [content]
        shares = self._rng.randrange(1, 4)
        for _ in range(shares):
            name, media_type, start = self._rng.choice(_ATTACHMENTS)
            name = name.format(n=self._rng.randrange(1_000, 99_999))
            fields = (
                f'Content-Type: {media_type}; name="{name}"\r\n'
                f'Content-Disposition: attachment; filename="{name}"\r\n'
            )
            parts.append(fields.encode() + self._base64(start, octets // shares))
        return self._multipart("mixed", *parts)

    def _plain(self, _: dict[str, bytes], octets: int) -> bytes:
        return _TEXT_PLAIN + self._text(octets)

    def _with_html(self, _: dict[str, bytes], octets: int) -> bytes:
        paragraphs = self._text(octets // 2).replace(b"\r\n", b"</p>\r\n<p>")
        html = (
            b"Content-Type: text/html; charset=utf-8\r\n\r\n<html><body>\r\n<p>%s</p>\r\n</body></html>\r\n"
        )
        return self._multipart("alternative", _TEXT_PLAIN + self._text(octets // 2), html % paragraphs)

    def _reply(self, _: dict[str, bytes], octets: int) -> bytes:
        quoted = b"> " + self._text(octets // 2).removesuffix(b"\r\n").replace(b"\r\n", b"\r\n> ")
        return _TEXT_PLAIN + self._text(octets // 2) + b"\r\n" + quoted + b"\r\n"

    def _rightly_declared(self, _: dict[str, bytes], octets: int) -> bytes:
        charset, text = self._rng.choice(_FOREIGN)
        return self._eight_bit(charset, text.encode(charset), octets)

    def _wrongly_declared(self, _: dict[str, bytes], octets: int) -> bytes:
        charset, text = self._rng.choice(_FOREIGN)
        declared = self._rng.choice(
            [other for other in ("us-ascii", "utf-8", "x-unknown") if other != charset]
        )
        return self._eight_bit(declared, text.encode(charset), octets)

    def _eight_bit(self, declared: str, line: bytes, octets: int) -> bytes:
        fields = f"Content-Type: text/plain; charset={declared}\r\nContent-Transfer-Encoding: 8bit\r\n\r\n"
        return fields.encode() + (line + b"\r\n") * (1 + octets // len(line))

    def _dots(self, _: dict[str, bytes], octets: int) -> bytes:
        dots = b".\r\n..\r\n.x\r\n...\r\n. \r\n.\t.\r\n\r\n.\r\n"
        return _TEXT_PLAIN + dots + self._text(octets) + dots

    def _long_lines(self, _: dict[str, bytes], octets: int) -> bytes:
        longest = self._text(max(_LONG_LINE_OCTETS) * 2).replace(b"\r\n", b" ")
        lines = (longest[:length] + b"\r\n" for length in _LONG_LINE_OCTETS)
        return _TEXT_PLAIN + self._text(octets) + b"".join(lines)

    def _no_message_id(self, fields: dict[str, bytes], octets: int) -> bytes:
        del fields["Message-ID"]
        return self._plain(fields, octets)

    def _no_subject(self, fields: dict[str, bytes], octets: int) -> bytes:
        del fields["Subject"]
        return self._plain(fields, octets)

    def _no_body(self, _: dict[str, bytes], __: int) -> bytes:
        return b"\r\n"

    def _no_blank_line(self, _: dict[str, bytes], __: int) -> bytes:
        return b""

    def _forwarded(self, fields: dict[str, bytes], octets: int) -> bytes:
        fields["Subject"] = b"Fwd: " + fields["Subject"]
        inner = b"From: %s\r\nSubject: forwarded\r\nMIME-Version: 1.0\r\n" % fields["To"]
        message = b"Content-Type: message/rfc822\r\n\r\n" + inner + self._with_html(fields, octets)
        return self._multipart("mixed", self._plain(fields, 500), message)

    def _signed(self, fields: dict[str, bytes], octets: int) -> bytes:
        signature = b'Content-Type: application/pkcs7-signature; name="smime.p7s"\r\n'
        signature += self._base64(_ASN1_SEQUENCE, 3_000)
        kind = 'signed; protocol="application/pkcs7-signature"; micalg=sha-256'
        return self._multipart(kind, self._plain(fields, octets), signature)

    def _encrypted(self, _: dict[str, bytes], octets: int) -> bytes:
        fields = b'Content-Type: application/pkcs7-mime; smime-type=enveloped-data; name="smime.p7m"\r\n'
        return fields + self._base64(_ASN1_SEQUENCE, octets)

    def _mailing_list(self, fields: dict[str, bytes], octets: int) -> bytes:
        fields["List-Id"] = b"Suppliers <suppliers.lists.contoso.example>"
        fields["List-Unsubscribe"] = b"<mailto:suppliers-request@lists.contoso.example?subject=unsubscribe>"
        fields["Precedence"] = b"bulk"
        fields["Subject"] = b"[suppliers] " + fields["Subject"]
        return self._plain(fields, octets) + b"_" * 47 + b"\r\nsuppliers@lists.contoso.example\r\n"

    def _raw_header(self, fields: dict[str, bytes], octets: int) -> bytes:
        charset, text = self._rng.choice(_FOREIGN)
        fields["Subject"] = text.encode(charset)
        fields["X-Encoded"] = _encoded_word(text).encode()
        return self._plain(fields, octets)

    def _multipart(self, subtype: str, *parts: bytes) -> bytes:
        boundary = f"=_{self._token()}"
        fields = f'Content-Type: multipart/{subtype};\r\n\tboundary="{boundary}"\r\n\r\n'.encode()
        delimiter = f"--{boundary}\r\n".encode()
        return (
            fields + b"".join(delimiter + part + b"\r\n" for part in parts) + f"--{boundary}--\r\n".encode()
        )

    def _base64(self, start: bytes, octets: int) -> bytes:
        """The end of a part's header, and its body: ``start`` and more, about ``octets`` octets encoded."""
        data = start + self._rng.randbytes(max(1, int(octets / _BASE64_GROWTH)))
        encoded = binascii.b2a_base64(data, newline=False)
        columns = range(0, len(encoded), _BASE64_COLUMNS)
        lines = b"\r\n".join([encoded[at : at + _BASE64_COLUMNS] for at in columns])
        return b"Content-Transfer-Encoding: base64\r\n\r\n" + lines + b"\r\n"

    def _text(self, octets: int) -> bytes:
        count = 1 + max(0, octets) // _LINE_OCTETS
        return b"\r\n".join(self._rng.choices(self._lines, k=count)) + b"\r\n"

    def _sentence(self) -> bytes:
        words = self._rng.choices(self._words, k=16)
        return " ".join(words).capitalize()[:_LINE_OCTETS].rstrip().encode()

    def _token(self) -> str:
        return f"{self._rng.getrandbits(64):016x}"


@dataclass(frozen=True, slots=True)
class _Thread:
    """A conversation that later messages may answer; its list of messages grows."""

    topic: str
    message_ids: list[str]


def _mailbox(name: str, address: str) -> str:
    shown = f'"{name}"' if name.isascii() else _encoded_word(name)
    return f"{shown} <{address}>"


def _encoded_word(text: str) -> str:
    """RFC 2047; of any length, as many senders write it."""
    return f"=?utf-8?B?{binascii.b2a_base64(text.encode(), newline=False).decode()}?="
