"""Personal data in a text, found by rules.

- EMAIL: an address with a domain; "name (at) shop.de" too.
- PHONE: what `phonenumbers` knows as a number of a country, and any possible number with + in front. A national number behind
  a word for another number ("order", "Rechnung", "pedido") is none, unless a word such as "call" stands nearer.
- CARD: digits of a payment card's range and length that pass Luhn's check (ISO/IEC 7812).
- IBAN: length and form of the country, and the check by modulo 97 (ISO 13616).

Placeholders ({{Order Number}}) are left alone, and numbers in web addresses. HTML and signatures of e-mails are told apart too.
"""

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

_AT = r"(?:@|[ ]?[(\[{]at[)\]}][ ]?)"
_LETTER = r"[\w\u0900-\u097f]"  # \w lacks the vowel signs of Devanagari
_SIGN = re.compile(_AT, re.IGNORECASE)
_LOCAL_BACKWARDS = re.compile(rf"{_LETTER}(?:{_LETTER}|[.%+'-])*")
_DOMAIN = re.compile(
    rf"(?:(?:{_LETTER}|-)+(?:\.|[ ]?[(\[]dot[)\]][ ]?))+"
    rf"(?!(?:png|jpe?g|gif|svg|webp|pdf|css|js)\b)[^\W\d_]{_LETTER}+",
    re.IGNORECASE,
)
_LONGEST_LOCAL, _LONGEST_DOMAIN = 64, 255  # RFC 5321, section 4.5.3.1
_PLACEHOLDER = re.compile(r"\{\{[^{}]*\}\}")
_LINK = re.compile(r"\b(?:https?://|www\.)[^\s<>\"]+", re.IGNORECASE)
_IBAN = re.compile(r"(?<![^\W_])[A-Z]{2}\d{2}(?:[ \u00a0-]?[A-Z0-9]){11,30}(?![^\W_])", re.IGNORECASE | re.ASCII)
_CARD = re.compile(r"(?<![\w+.,-])\d(?:[ \u00a0-]?\d){11,18}(?![-.,]?\w)")
# By range, the lengths in use: Visa, Mastercard, American Express, Diners, Discover, JCB, UnionPay, RuPay, Maestro.
_CARD_RANGES = re.compile(
    r"4(?:\d{15}|\d{18})|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}|"
    r"3(?:0[0-5]|[689]\d)\d{11}|(?:6011|64[4-9]\d|65\d\d|35(?:2[89]|[3-8]\d)|62\d\d|60\d\d|81\d\d|508\d)\d{12}|"
    r"(?:5018|5020|5038|5893|6304|6759|676[1-3])\d{8,15}"
)
_CARD_GROUPS = {(4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (4, 4, 4, 4, 3)}
_PHONE = re.compile(r"(?:[+\uff0b(]{1,2}[ ]?)?\d(?:[ \u00a0\u2009\u202f().\-/\u2011\u2013]{0,4}\d){6,18}")
UNJUDGED = "a number without +"  # that a region's rules would tell from a phone's
_BEHIND = 14  # characters behind a number that may be its extension
# What has the signs of a phone number and is none: a date, the address of a machine, what hangs on other text, an amount.
_DATE = re.compile(r"(?:\d{1,2}[./-]\d{1,2}[./-](?:19|20)?\d\d|(?:19|20)\d\d[./-]\d{1,2}[./-]\d{1,2})(?![./-]?\d)")
_MACHINE = re.compile(r"(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?!\d)")
_ATTACHED = re.compile(r"(?:[\w#]|[^\W_][-/_=]|\d[.,:]|[$€£₹][ ]?)\Z")
_AMOUNT = re.compile(
    r"[\w%€£₹]|[-/.,:_]\w|\s?(?:[%$€£₹°]|(?:eur(?:os?)?|usd|inr|gbp|dollars?|pounds?|rupees?|rs|(?:de )?pesos|rupien|रुपये|"
    r"k[mg]|[mc]m|ml|[kmg]b|bytes?|kwh|units?|stück|unidades)\b)",
    re.IGNORECASE,
)
_OTHER_NUMBER = (
    r"\borders?\b|order ?(?:id|no|num)|purchase|tickets?\b|\bcase\b|\bref\b|reference|track|invoice",
    r"(?:customer|client|bill(?:ing)?|member(?:ship)?|loyalty|user|employee|patient|policy|contract) ?(?:id|no|num)",
    r"\bacc(?:oun)?t\b|a/c|serial|s/n",
    r"\bsku\b|\bitem|article|model|part n|\bisbn|\bean\b|\bupc\b|gtin|\bimei|\bzip\b|postcode|(?<!area )\bcode",
    r"\bids?\b|booking|reservation|confirmation|policy|\bawb\b|parcel|shipment|package|consignment|\btxn",
    r"transaction|\butr\b|\bgst|aadhaar|passport|social security|voucher|coupon|gift ?card|request n|claim|version|\bbuild\b",
    r"firmware|barcode|\b(?:licen[cs]e|tax|registration|routing|roll|student|receipt|delivery|return|application|consumer|meter|"
    r"complaint|quote|job|docket|check|file|flight|nhs|medicare|vat|po) ?(?:id|no|num)|\bpnr\b|\brma\b|\bvin\b",
    r"bestell|auftrag|kunden-?n|rechnung|sendung|paket|vorgang|vertrag|artikel|serien|konto|beleg|aktenzeichen|steuer",
    r"gutschein|lieferung|reklamation|geräte|modell|mitglied|\bplz\b|ticket|referenz|buchung|"
    r"zähler|angebot|retoure|police-?n|personal-?n|versicherungsn|ausweis|transaktion|fall-?nummer",
    r"pedido|factura|seguimiento|referencia|número de cliente|cuenta|incidencia|reserva|artículo|\bserie\b|código|envío",
    r"albarán|expediente|\bdni\b|\bnif\b|paquete|compra|póliza|contrato|\bde (?:recibo|caso)\b|reclamación|\btique?t",
    r"commande|facture|colis|suivi|ordine|fattura|spedizione|encomenda",
    r"ऑर्डर|आर्डर|टिकट|ट्रैक|बिल|इनवॉइस|खात|संदर्भ|बुकिंग|कोड|शिकायत|रेफरेंस|पार्सल|सीरियल|आधार|आवेदन|रसीद|पीएनआर",
)
_PHONE_NUMBER = (
    r"(?<!\ba )(?<!\bi )\b(?:(?:tele)?phone(?:\d|n\w*)?\b|mobil|cell|call|ring\b)|\btel\b|\btext (?:me|us|him|her)",
    r"\bsms\b|whats ?app|\bfax|hotline|\bdial|\breach(?:able)?\b|\bcontact(?! lens)",
    r"\b(?:my|your|his|her|their) (?:new |other )?n(?:umber|o)\b",
    r"\b(?:customer|client|neighbou?r|wife|husband|mother|father|son|daughter|brother|sister|friend)'s n(?:umber|o)\b",
    r"\b(?:best|home|work|office|daytime|callback|toll-?free) n(?:umber|o)\b",
    r"(?<!\bein )\btelef(?!ons\b)|\bhandy(?:n\w*)?\b|durchwahl|\berreich(?:e|en|bar)\b|\b(?:an|rück)ruf",
    r"\b(?:zurück|an)?(?:ge|zu)?ruf(?:e|t|en|n\w*)?\b|\b(?:meine|neue|deine|ihre|seine) (?:neue )?nummer",
    r"(?<!\bun )\b(?:teléf|móvil)|(?<!\bse )\bll[aá]m|\bmi número(?! de )",
    r"(?<![\w\u0900-\u097f])(?:टेली)?(?:फोन|फ़ोन)|मोबाइल|कॉल|व्हाट्स|संपर्क|मेरा (?:नया )?नंबर",
)
_NUMBER_WORDS = re.compile(f"(?P<other>{'|'.join(_OTHER_NUMBER)})|(?P<phone>{'|'.join(_PHONE_NUMBER)})", re.IGNORECASE)
_NAME_OF_AN_AMOUNT = re.compile(
    r"amount|price|total|quantity|balance|\bcost|salary|timestamp|betrag|preis|summe|menge|saldo|importe|precio|cantidad",
    re.IGNORECASE,
)
_IN_A_NAME = re.compile(r"_|(?<=[a-z])(?=[A-Z])")  # order_id, orderId
_CLAUSE = re.compile(r"[!?;\n]|[.,]\s+(?=[^\W\d_])")
_IN_FRONT = 45  # characters in which such a word counts
_HTML = re.compile(
    r"</?(?:a|b|i|u|p|br|hr|em|tt|h[1-6]|ul|ol|li|td|th|tr|div|img|pre|sub|sup|span|font|code|html|body|head|meta|style|table|"
    r"tbody|thead|strong|small|center|script|blockquote)(?:\s[^<>]*)?/?>|"
    r"&(?:nbsp|amp|lt|gt|quot|apos|szlig|euro|[a-z](?:uml|acute|grave|circ|tilde|cedil|ring|slash|caron)|iexcl|iquest|[lr]aquo|"
    r"hellip|bull|middot|deg|pound|cent|copy|reg|trade|times|sect|ord[fm]|shy|[lr][ds]quo|[mn]dash|#\d{2,5}|#x[0-9a-f]{2,5});",
    re.IGNORECASE,
)
_CLOSING = (
    r"(?:with )?(?:kind|best|warm|many)(?:est)? (?:regards|wishes)|regards|cheers|(?:yours )?(?:sincerely|faithfully|truly)",
    r"mit freundlichen grüßen|mit freundlichem gruß|(?:viele|liebe|beste|schöne|herzliche) grüße|mfg|lg|vg",
    r"(?:un )?(?:cordial )?saludos?(?: cordial(?:es)?)?|atentamente|cordialmente",
    r"सादर|शुभकामनाओं के साथ|भवदीय",
)
# A line of two dashes (RFC 3676), a phone's own line, or a closing with a name behind or below it.
_SIGNATURE = re.compile(
    r"^--[ ]?\r?$\s*\S|^(?:sent from my|sent from (?:outlook|yahoo)|get outlook for|von meinem .{2,30} gesendet|gesendet von|"
    r"diese nachricht wurde von|enviado desde|मेरे .{2,30} से भेजा)|"
    rf"^[ \t]*(?:{'|'.join(_CLOSING)})(?:[ \t]*(?:[,.!][ \t]*)?\r?\n\s*\S[^\n]{{1,60}}|[ \t]*,[ \t]*\S[^\n]{{1,60}})$",
    re.IGNORECASE | re.MULTILINE,
)


def find_personal(text: str, region: str | None = None, column: str = "") -> list[tuple[int, int, str]]:
    """Where personal data stands in a text: (start, end, kind), in order; the kinds are EMAIL, PHONE, CARD and IBAN.

    Args:
        region: two letters of the country whose phone numbers are looked for; without it only numbers with +.
        column: the name of the text's column: a number that stands alone in `order_id` is no phone's.
    """
    return [one for one in _find(text, region, column) if one[2] != UNJUDGED]


def count_unjudged(text: str, column: str = "") -> int:
    """How many numbers without + in a text may be phone numbers: which are, only a region tells."""
    return sum(kind == UNJUDGED for _, _, kind in _find(text, None, column))


@lru_cache(maxsize=1024)  # a row's columns are read for the report, for the prompt and for the comparison of questions
def _find(text: str, region: str | None, column: str) -> tuple[tuple[int, int, str], ...]:
    has_digits = _PHONE.search(text) is not None
    has_at = _SIGN.search(text) is not None
    if not has_digits and not has_at:
        return ()
    found: list[tuple[int, int, str]] = []
    is_taken = bytearray(len(text))
    if any(map(str.isalpha, text)):  # a text of numbers alone holds those that its column's name says
        column = ""

    def take(spans: Iterator[tuple[int, int]]) -> None:
        for start, end in spans:
            is_taken[start:end] = b"\1" * (end - start)

    def add(kind: str, spans: Iterator[tuple[int, int]]) -> None:
        for start, end in spans:
            if not any(is_taken[start:end]):
                take(iter([(start, end)]))
                found.append((start, end, kind))

    take(m.span() for m in _PLACEHOLDER.finditer(text))
    if has_at:
        add("EMAIL", _emails(text))
    take(m.span() for m in _LINK.finditer(text))
    if has_digits:
        add("IBAN", _ibans(text))
        add("CARD", _cards(text, column))
        add("PHONE", _phones(text, region, column))
        if region is None:
            add(UNJUDGED, _unjudged(text, column))
    return tuple(sorted(found))


def has_html(text: str) -> bool:
    return ("<" in text or "&" in text) and _HTML.search(text) is not None


def has_signature(text: str) -> bool:
    return "\n" in text and _SIGNATURE.search(text) is not None


def _emails(text: str) -> Iterator[tuple[int, int]]:
    end = 0
    # From the sign on, both ways: a pattern of the whole would begin anew at each letter of a long run.
    for sign in _SIGN.finditer(text):
        local = _LOCAL_BACKWARDS.match(text[max(end, sign.start() - _LONGEST_LOCAL) : sign.start()][::-1])
        domain = _DOMAIN.match(text, sign.end(), sign.end() + _LONGEST_DOMAIN)
        if local and domain:
            end = domain.end()
            yield sign.start() - local.end(), end


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    from stdnum import iban

    for match in _IBAN.finditer(text):
        # A word may follow that reads like one more group.
        ends = [i for i in range(match.start() + 15, match.end() + 1) if i == match.end() or not text[i].isalnum()]
        for end in reversed(ends):
            if iban.is_valid(re.sub(r"\W", "", text[match.start() : end]), check_country=False):
                yield match.start(), end
                break


def _cards(text: str, column: str) -> Iterator[tuple[int, int]]:
    from stdnum import luhn

    for match in _CARD.finditer(text):
        groups = tuple(map(len, re.split(r"\D", match[0])))
        digits = "".join(str(unicodedata.digit(c)) for c in match[0] if c.isdigit())
        if len(groups) > 1 and groups not in _CARD_GROUPS or not _CARD_RANGES.fullmatch(digits):
            continue
        if luhn.is_valid(digits) and not _is_other_number(text, match.start(), column):
            yield match.span()


def _phones(text: str, region: str | None, column: str) -> Iterator[tuple[int, int]]:
    from phonenumbers import Leniency, PhoneNumberMatcher

    for candidate in _PHONE.finditer(text):
        start, end = candidate.span()
        has_plus = _has_plus(candidate[0])
        if has_plus and text[start - 1 : start].isdigit():
            continue
        if not has_plus and (region is None or not _may_be_national(text, candidate, column)):
            continue
        leniency = Leniency.POSSIBLE if has_plus else Leniency.VALID
        for match in PhoneNumberMatcher(text[start : end + _BEHIND], region, leniency):
            if match.start >= end - start:
                break
            # One of two brackets around the number is no part of it.
            is_open = match.raw_string.startswith("(") and ")" not in match.raw_string
            yield start + match.start + is_open, start + match.end


def _has_plus(number: str) -> bool:
    return re.match(r"[(]?[+\uff0b][(]?\d", number) is not None


def _may_be_national(text: str, candidate: re.Match[str], column: str) -> bool:
    """Whether nothing around a number without +, nor its form, says that it is no phone's."""
    start, end = candidate.span()
    return not (
        _ATTACHED.search(text[max(0, start - 3) : start]) or _AMOUNT.match(text, end)
        or _DATE.match(candidate[0]) or _MACHINE.match(candidate[0])
        or "(" not in candidate[0] and _is_other_number(text, start, column)
    )  # fmt: skip


def _unjudged(text: str, column: str) -> Iterator[tuple[int, int]]:
    """As long as a phone number with its area code (ITU-T E.164 has 15 digits at most), or with the 0 or bracket of one."""
    for candidate in _PHONE.finditer(text):
        digits = sum(map(str.isdigit, candidate[0]))
        has_area = 9 <= digits <= 15 or digits < 9 and candidate[0][0] in "0("
        if has_area and not _has_plus(candidate[0]) and _may_be_national(text, candidate, column):
            yield candidate.span()


def _is_other_number(text: str, start: int, column: str) -> bool:
    """Whether the nearest word in front of a number says that it is an order's, a parcel's ... and not a phone's."""
    if _NAME_OF_AN_AMOUNT.search(column):
        return True
    in_front = _IN_A_NAME.sub(" ", column or text[max(0, start - _IN_FRONT) : start])
    words = list(_NUMBER_WORDS.finditer(_CLAUSE.split(in_front)[-1]))
    return bool(words) and words[-1].lastgroup == "other"
