"""Write those of the demo shop's documents that are no plain text: a PDF, a DOCX, an HTML page and the catalogue as CSV.

They say what the conversations of demo/data say. The same script always gives the same bytes (with one version of python-docx).

    python demo/make_documents.py            # writes into demo/documents
    python demo/make_documents.py --check    # exits with 1 where the files differ from what the script gives
"""

# ruff: noqa: E501 - a phrase of the tables stays on one line
import argparse
import csv
import html
import io
import sys
import zipfile
from datetime import datetime
from pathlib import Path

from make_data import DEVICES, EVERYTHING, GOODS, MAIL, PHONE, SHOP, Product
from write_pdf import Words, pdf, width, wrapped

DOCUMENTS = Path(__file__).resolve().parent / "documents"
LEFT, TOP, BOTTOM, COLUMN = 70, 770, 90, 455  # points
CATEGORIES = {2: "clothing and bags", 3: "blankets and towels", 4: "home", 5: "home", 6: "kitchen", 8: "furniture",
              9: "bike", 11: "medicines", 12: "medicines", 13: "health devices"}  # fmt: skip  # by aisle
NO_MEDICINES = {"Softpine plasters", "Dunelight sun lotion"}

RETURNS = [
    ("1 Returns", 1, []),
    ("1.1 How to send something back", 2, [
        "You can return unused goods within 30 days. The label for the parcel is free: print it under My Orders, at the order "
        "that the goods are from. If you have no printer, show the order number at the post counter, and they print the label for "
        "you. Order numbers begin with HP.",
        "You can also bring the goods back to the service desk in our shop, with the receipt or the order number.",
    ]),
    ("1.2 What we do not take back", 2, [
        "Medicines cannot be returned. The pharmacy corner throws away old ones safely for you.",
    ]),
    ("1.3 Exchanging", 2, [
        "An exchange is free once. Choose Exchange under My Orders and send the goods back with the same label.",
    ]),
    ("1.4 Cancelling an order", 2, [
        "You can cancel an order under My Orders until it is packed. That is free, and your money comes back within five working "
        "days. When it is packed already, let it come and send it back free of charge within 30 days. The address can be changed "
        "until then too. Once an order is paid, nothing can be added to it.",
    ]),
    ("2 Refunds", 1, []),
    ("2.1 When the money comes", 2, [
        "A refund takes five working days after the parcel has reached us. It goes to the card or account that you paid with.",
        "If it takes longer, send us the post receipt and the order number, and we look into it on the same day.",
    ]),
    ("2.2 A gift card instead", 2, [
        "If you would rather have a gift card, choose Gift Card under My Orders before the refund is paid.",
    ]),
    ("3 When something is wrong", 1, []),
    ("3.1 Broken", 2, [
        f"If something arrives broken, scratched or with a crack, send a photo and the order number to {MAIL}. You may choose: we "
        "send a new one free of charge, or pay back the price. A new one leaves our shop within two working days. You need not "
        "send the broken one back; keep it or throw it away.",
    ]),
    ("3.2 Missing", 2, [
        "Some orders travel in two parcels. If something is missing, wait two days for the second one. If it has not come then, "
        "tell us, and we send it again free of charge.",
    ]),
    ("3.3 Late", 2, [
        "If a parcel is not there after six working days, write to us and we start a search. You hear from us by e-mail within two "
        "working days. If the parcel is not found within that time, we send the order again, or you get the full price back.",
    ]),
    ("4 Warranty", 1, [
        "Depending on the product, the warranty is one, two, three, five or ten years; the product's page and the catalogue say "
        "which. Bring the product to the service desk with the receipt or the order number. If the receipt is lost, the order "
        "number is enough, and you find it under My Orders. A repair takes about two weeks.",
    ]),
    ("5 How to reach us", 1, [
        f"The care team is there from Monday to Saturday, 9 to 18, on {PHONE}. Letters to {MAIL} are answered within one working "
        "day.",
    ]),
]  # fmt: skip

DELIVERY = [
    ("How long it takes", 1, [
        "A parcel takes two to four working days. The Coast Post brings it between 9 and 17 on working days. The page My Orders "
        "shows every step of an order.",
        "Two orders are packed together where we can, and delivery is then paid once.",
    ]),
    ("What it costs", 1, [
        "Delivery costs the same to every town. An order of 50 euros or more is free of delivery costs.",
        [("Way", "Price", "When it comes"),
         ("Standard", "4.90 euros; free from 50 euros", "within two to four working days"),
         ("Express", "9.90 euros", "on the next working day"),
         ("Collected at the shop", "free", "ready after two hours")],
    ]),
    ("Where it goes", 1, []),
    ("Another address", 2, [
        "The address of an order can be changed under My Orders until the parcel is packed. When it is packed already, the Coast "
        "Post keeps it for seven days, and you can send it on. Another town costs nothing more.",
    ]),
    ("Collecting it yourself", 2, [
        "An order can be collected at our shop, 4 Quay Street, free of charge and after two hours.",
    ]),
    ("When nobody is at home", 2, ["The Coast Post keeps a parcel for seven days."]),
    ("When it does not come", 1, [
        "If a parcel is not there after six working days, write to us with the order number. We start a search on the same day, "
        "and you get an answer within two working days. If it is not found, we send it again or pay back the money.",
    ]),
]  # fmt: skip


def returns() -> bytes:
    """A cover with its contents, then the chapters, each page with a footer."""
    pages: list[list[Words]] = [[]]
    contents: list[tuple[str, int, int]] = []  # heading, level, page from 0
    y = 0.0
    for heading, level, paragraphs in RETURNS:
        size = 16 if level == 1 else 12.5
        needed = size + 34 + 14 * sum(len(list(wrapped(text, COLUMN))) for text in paragraphs[:1])
        if y - needed < BOTTOM:
            pages.append([])
            y = TOP
        contents.append((heading, level, len(pages) - 1))
        y -= size + 14
        pages[-1].append(Words(heading, LEFT, y, size, bold=True))
        y -= 6
        for text in paragraphs:
            for line in wrapped(text, COLUMN):
                y -= 14
                pages[-1].append(Words(line, LEFT, y))
            y -= 7
    title = "Returns, refunds and warranty"
    cover = [Words(title, LEFT, 700, 24, bold=True), Words(f"{SHOP}, edition of January 2026", LEFT, 672)]
    cover.append(Words("Contents", LEFT, 610, 16, bold=True))
    for row, (heading, level, page) in enumerate(contents):
        x, y = LEFT + 14 * (level - 1), 580 - 18 * row
        dots = "." * int((LEFT + COLUMN - 20 - x - width(heading, 11)) / width(".", 11) - 3)
        cover.append(Words(f"{heading} {dots} {page + 1}", x, y))
    pages[0] = cover
    for number, words in enumerate(pages, 1):
        words.append(Words(f"{SHOP}: {title.lower()}, page {number} of {len(pages)}", LEFT, 45, 9))
    return pdf(pages, title=title, bookmarks=[(heading, page) for heading, level, page in contents if level == 1])


def delivery() -> bytes:
    from docx import Document

    document = Document()
    about = document.core_properties
    about.title, about.author, about.created = "Delivery", SHOP, datetime(2026, 1, 12)
    document.add_heading("Delivery", 0)
    for heading, level, parts in DELIVERY:
        document.add_heading(heading, level)
        for part in parts:
            if isinstance(part, str):
                document.add_paragraph(part)
                continue
            table = document.add_table(len(part), len(part[0]), style="Table Grid")
            for cells, texts in zip(table.rows, part):
                for cell, text in zip(cells.cells, texts):
                    cell.text = text
    file = io.BytesIO()
    document.save(file)
    return _without_times(file.getvalue())


def _without_times(packed: bytes) -> bytes:
    """An archive whose parts were all written at one time: the same bytes whenever it is made."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(packed)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(zipfile.ZipInfo(part.filename, (2026, 1, 12, 0, 0, 0)), old.read(part), zipfile.ZIP_DEFLATED)
    return file.getvalue()


def care() -> bytes:
    """A page as a shop's web site has it, with what its readers do not see."""
    parts = ["<!DOCTYPE html>", '<html lang="en"><head><meta charset="utf-8">', f"<title>Looking after things | {SHOP}</title>",
             "<style>.cookies { display: none } main { max-width: 40em }</style>",
             "<script>window.seen = [];</script></head><body>",
             '<nav><a href="/">Home</a> <a href="/care">Care</a> <a href="/club">Pine Club</a></nav>',
             '<div class="cookies">We use cookies. <button>Accept all</button></div>', "<main><h1>Looking after things</h1>",
             "<p>How to clean and keep what you have from us, and how long its warranty is. A little mild soap does no harm. If "
             "something went wrong, bring the product to the service desk, and we have a look at it.</p>"]  # fmt: skip
    for category in dict.fromkeys(map(_category, GOODS + DEVICES)):
        parts.append(f"<h2>{category.capitalize()}</h2>")
        for product in GOODS + DEVICES:
            if _category(product) == category:
                care = f"{product.care[0].upper()}{product.care[1:]}."
                parts.append(
                    f"<h3>{html.escape(product.name)}</h3>\n<p>Made of {product.stuff}. {care} Warranty: {product.warranty}.</p>"
                )
    parts += ["</main>", f"<footer><p>{html.escape(SHOP)}, 4 Quay Street, {PHONE}</p></footer>", "</body></html>\n"]
    return "\n".join(parts).encode()


def catalogue() -> bytes:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["product", "category", "price_euros", "aisle", "material", "good_for", "care", "warranty"])
    for p in EVERYTHING:
        writer.writerow([p.name, _category(p), p.price, p.aisle, p.stuff, p.use, p.care, p.warranty])
    return file.getvalue().encode()


def _category(product: Product) -> str:
    return "care and first aid" if product.name in NO_MEDICINES else CATEGORIES[product.aisle]


FILES = {
    "returns-and-refunds.pdf": returns,
    "delivery.docx": delivery,
    "product-care.html": care,
    "catalogue.csv": catalogue,
}


def main(arguments: list[str] | None = None) -> int:
    """Write or check the files; the exit code is 1 where a check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, compare with the files that are there")
    check = parser.parse_args(arguments).check
    made = {DOCUMENTS / name: make() for name, make in FILES.items()}
    if check:
        different = [path.name for path, content in made.items() if not path.is_file() or path.read_bytes() != content]
        print("differs: " + ", ".join(different) if different else "all files are as the script gives them")
        return 1 if different else 0
    for path, content in made.items():
        path.write_bytes(content)
        print(f"{path}: {len(content):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
