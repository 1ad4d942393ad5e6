"""What is found and what isn't, and what stands there afterwards."""

from __future__ import annotations

import pytest

from megatrain.data_prep.notes import Notes
from megatrain.data_prep.screening.config import Found, PersonalDataConfig
from megatrain.data_prep.screening.personal_data import PersonalData
from tests.data_prep.deduplicate.common import documents

ALL = PersonalDataConfig(Found.replace, Found.replace, Found.replace)

FOUND = {
    "email": [
        "jane.doe@mail.example.net",
        "o'neil+spam@uni-köln.example.de".replace("ö", "oe"),
        "a@b.museum",
        "x_1%y@sub.domain.co.uk",
    ],
    "ip": ["8.8.8.8", "193.0.14.129", "2a00:1450:4001:82b::200e", "2620:fe::fe", "2606:4700:4700:0:0:0:0:1111"],
    "phone": [
        "+1 212 555 0199",
        "+44 20 7946 0958",
        "+49 (30) 1234567",
        "+8613812345678",
        "(212) 555-0199",
        "212-555-0199",
        "1-800-356-9377",
        "01 42 68 53 00",
        "01.42.68.53.00",
        "020 7946 0958",
        "07700 900123",
        "138-1234-5678",
    ],
}
NOT_FOUND = [
    "@decorator and user@host, a @ b.c, foo@1.2",
    "10.0.0.1, 192.168.1.1, 127.0.0.1, 256.1.1.1, 0.0.0.0",
    "version 1.2.3.4.5 or v1.2.3.4, 1.2.3.4a, 999.999.999.999",
    "std::vector, a::b, 2001:db8::1, fe80::1, ::1, 12:34:56, 2024:10:11, 23ab:cd",
    "2024-10-11 12:30:45, 1234567890, 1700000000000, 3.14159265358979, 555-0199",
    "ISBN 978-3-16-148410-0, 4111 1111 1111 1111, +1.5, a+12345678, 1+1",
    "už.ivatel@doména.cz, živatel@server.doména.cz, " + 70 * "x" + "@example.org",
    "08 00 06 04 00 01 00 14 and 01 02 03 04 05 06 and 00 01 02 03 04 05",
    "0x0142685300 and 01 42 68 and 100-200-3000, 123-456-78901, 212-555-01992",
]


def replaced(text: str, config: PersonalDataConfig = ALL) -> tuple[str, Notes]:
    notes = Notes()
    return PersonalData(config)(documents([text]), notes).texts[0], notes


@pytest.mark.parametrize(("kind", "value"), [(kind, value) for kind, values in FOUND.items() for value in values])
@pytest.mark.parametrize("around", ["{}", "Say {}.", "<{}>", "an,{},b", "看{} 看"])
def test_what_is_found(kind: str, value: str, around: str) -> None:
    replacement = {
        "email": ALL.email_replacements,
        "ip": ALL.ipv6_replacements if ":" in value else ALL.ip_replacements,
        "phone": ALL.phone_replacements,
    }[kind][0]
    text, notes = replaced(around.format(value))
    assert text == around.format(replacement)
    assert {what: tally.documents for what, tally in notes.changed["personal_data"].items()} == {kind: 1}


@pytest.mark.parametrize("text", NOT_FOUND)
def test_what_is_not(text: str) -> None:
    assert replaced(text)[0] == text


def test_replacements_take_turns_in_a_document() -> None:
    text, notes = replaced("a@b.org, c@d.org@g.org, e@f.org and 8.8.8.8")
    assert text == ("email@example.com, firstname.lastname@example.org@g.org, email@example.com and 22.214.171.124")
    (example,) = notes.changed["personal_data"]["email_ip"].examples
    assert (example.text, example.value) == (text, "3 email, 1 ip")


def test_documents_are_dropped_and_the_report_holds_no_address() -> None:
    notes = Notes()
    config = PersonalDataConfig(email=Found.drop, phone=Found.replace)
    kept = PersonalData(config)(documents(["a@b.org", "8.8.8.8", "212-555-0199", "nothing"]), notes)
    assert kept.texts == ["8.8.8.8", "+1-202-555-0123", "nothing"]
    (example,) = notes.dropped["personal_data"]["email"].examples
    assert (example.id, example.text) == ("0", "email@example.com")
    assert notes.entered["personal_data"] == 4


def test_nothing_is_looked_for_by_default() -> None:
    text = " ".join(value for values in FOUND.values() for value in values)
    assert replaced(text, PersonalDataConfig())[0] == text
