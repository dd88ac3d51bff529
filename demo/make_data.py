"""Write the demo data: conversations with the care desk of an invented shop, and the text its base model reads.

Everything here is made up for this project by a small grammar: a phrase may hold choices such as
``(late|slow)`` and slots such as ``{order}``. The same seed always gives the same bytes.

    python demo/make_data.py            # writes demo/data/*.jsonl and demo/data/corpus.txt
    python demo/make_data.py --check    # exits with 1 where the files differ from what the seed gives
"""

# ruff: noqa: E501 - a phrase of the tables stays on one line
from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SHOP = "Harbour & Pine"
PHONE = "0555 0142"
MAIL = "care@harbourandpine.example"
SPLIT_SIZES = {"train": 1960, "validation": 150, "test": 300}
CORPUS_CHARACTERS = 1_200_000
DEFAULT_SEED = 20

FIRST_NAMES = (
    "Ada Aino Alba Amir Ana Anton Arne Astrid Bea Ben Björn Bo Carla Cem Chloe Clara Dana Dario David Dina Edda Eero "
    "Elif Elsa Emil Emma Enzo Erik Esra Eva Farah Felix Finn Flora Freya Gina Greta Gus Hana Hanna Hugo Ida Ines Ingrid "
    "Iris Isak Ivo Jana Jasper Joan Jonas Jules Kaja Karim Kira Lara Lars Lea Leo Lina Linus Lotte Luca Lucy Maja Mara "
    "Marco Mark Marta Max Mila Mina Mira Mona Nadia Nils Nina Noah Nora Olaf Olga Omar Oskar Otto Paula Per Petra Pia "
    "Rafael Rasmus Rita Rosa Ruben Rune Sam Samira Sara Selma Signe Simon Sofia Stella Sven Tara Theo Thora Tilda Tom "
    "Tove Uma Vera Viktor Wanda Willa Yara Yusuf Zoe"
).split()
LAST_NAMES = (
    "Adler Aalto Berg Blom Brandt Castro Dahl Demir Ekman Falk Fisher Gomez Grant Haas Hansen Holm Ibsen Jansen Kaplan "
    "Keller Koch Lang Larsen Lindt Lopez Lund Marino Meyer Moss Nagy Nolan Novak Olsen Ortega Palmer Quist Rahman Reyes "
    "Rossi Sand Silva Stone Strand Sutter Tamm Torres Vogel Wagner West Winter Wolf Young Zeller"
).split()
SYLLABLES = "ba bel bro cal da del do fa fen ga go ha hil jo ka kel lo lun ma mer mo na nim no pa pel ra ro sa sel ta tor".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday".split()
MONTHS = ("January February March April May June July August September October November December").split()
CITIES = "Aldmouth Birchfield Corran Dunmore Eastness Fernley Greywick Hollin Kelby Northsea Oakham Ravensund".split()
MOODS = {"neutral": 34, "angry": 18, "worried": 16, "happy": 12, "hurried": 10, "confused": 10}


@dataclass(frozen=True)
class Product:
    """One article on the shelves, with the facts that answers and texts repeat."""

    name: str
    price: str
    stuff: str
    care: str
    aisle: int
    warranty: str
    use: str


GOODS = [
    Product("Skerry wool blanket", "59.90", "lambswool", "wash it cold by hand", 3, "two years", "cold evenings"),
    Product("Lantern storm lamp", "34.50", "brass and glass", "wipe it with a dry cloth", 5, "two years", "the garden"),
    Product("Tern rain jacket", "89.00", "coated cotton", "wash it at thirty degrees", 2, "three years", "wet days"),
    Product("Cove enamel kettle", "42.00", "enamelled steel", "dry it after every use", 6, "five years", "the kitchen"),
    Product("Pine desk chair", "129.00", "solid pine", "rub it with oil once a year", 8, "five years", "the desk"),
    Product("Gull canvas bag", "24.50", "heavy canvas", "brush it and let it air", 2, "two years", "the market"),
    Product("Anchor door mat", "19.90", "coconut fibre", "shake it out and brush it", 4, "one year", "the front door"),
    Product("Heather bath towel", "17.50", "organic cotton", "wash it at sixty degrees", 3, "one year", "the bath"),
    Product("Ferry lunch box", "14.90", "steel", "put it in the dishwasher", 6, "two years", "school and work"),
    Product("Kelp green teapot", "38.00", "stoneware", "rinse it with clear water", 6, "two years", "slow mornings"),
    Product("Driftwood shelf", "74.00", "oak", "dust it with a soft cloth", 8, "five years", "books and plants"),
    Product("Mist glass vase", "22.00", "blown glass", "rinse it by hand", 5, "one year", "fresh flowers"),
    Product("Islander wool socks", "12.90", "merino wool", "wash them cold", 2, "one year", "long walks"),
    Product("Beacon bike light", "27.90", "aluminium", "keep it dry and charge it monthly", 9, "two years", "dark roads"),
    Product("Quay bread knife", "31.00", "forged steel", "wash it by hand and dry it", 6, "ten years", "fresh bread"),
    Product("Sailcloth apron", "26.00", "washed linen", "wash it at forty degrees", 6, "two years", "cooking"),
    Product("Pebble alarm clock", "29.50", "maple wood", "wipe it with a dry cloth", 5, "two years", "the bedside"),
    Product("Northwind umbrella", "33.00", "steel and nylon", "let it dry open", 2, "three years", "stormy days"),
    Product("Marsh rubber boots", "54.00", "natural rubber", "rinse them with cold water", 2, "two years", "muddy paths"),
    Product("Cinder candle set", "16.50", "beeswax", "keep it away from the sun", 5, "one year", "dark afternoons"),
]  # fmt: skip
REMEDIES = [
    Product("Calmwave travel tablets", "8.90", "ginger", "keep them dry", 11, "two years", "travel sickness"),
    Product("Mossberry cough syrup", "9.50", "moss and berries", "close it well", 11, "one year", "a dry cough"),
    Product("Saltleaf nasal spray", "6.90", "sea salt", "rinse the tip", 11, "one year", "a blocked nose"),
    Product("Birchbalm foot cream", "7.50", "birch and urea", "close the lid", 12, "two years", "dry feet"),
    Product("Fennelrest stomach drops", "10.90", "fennel", "keep them dark", 11, "two years", "an upset stomach"),
    Product("Dunelight sun lotion", "15.90", "zinc", "keep it out of the heat", 12, "one year", "sensitive skin"),
    Product("Coolmint headache tablets", "5.90", "mint and willow", "keep them dry", 11, "two years", "a headache"),
    Product("Reedwater eye drops", "11.50", "clear saline", "use them within a month", 11, "one year", "tired eyes"),
    Product("Hushpillow sleep tea", "6.50", "valerian and hops", "keep it dry", 12, "two years", "restless nights"),
]  # fmt: skip
DEVICES = [
    Product("Softpine plasters", "4.50", "soft cotton", "keep them clean", 12, "one year", "small cuts"),
    Product("Pulsekeeper pressure monitor", "64.00", "plastic with a soft cuff", "wipe it", 13, "five years", "home checks"),
    Product("Fairday thermometer", "18.90", "plastic with a soft tip", "clean the tip", 13, "two years", "fever"),
]  # fmt: skip
EVERYTHING = GOODS + REMEDIES + DEVICES


@dataclass(frozen=True)
class Intent:
    """What a customer may want: how it is asked, how it is answered, what comes after.

    ``held_out`` phrasings are only used in the test split. ``vague`` questions leave the order number or the
    product out, and are only used in conversations where the assistant asks for it.
    """

    name: str
    category: str
    needs: str
    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    answers: tuple[str, ...]
    follow_ups: tuple[tuple[str, str], ...]
    vague: tuple[str, ...] = ()
    plain: bool = False


INTENTS = [
    Intent("order_status", "orders", "order",
        ("(Where is|What happened to) my order {order}?", "(Can|Could) you tell me where order {order} is (now|at the moment)?",
         "I ordered the {product} on {date}, number {order}. (When does it come|When will it be here)?",
         "(Has order {order} been sent|Did order {order} leave your shop) (yet|already)?",
         "(Is there anything new|What is new) about order {order}?", "I am (still |)waiting for (my|the) {product}, the number is {order}."),
        ("Any news on {order}?", "I am still looking out for my {product}, order {order}."),
        ("You can follow order {order} under My Orders. A parcel takes two to four working days.",
         "The page My Orders shows every step of order {order}. Most parcels arrive within two to four working days."),
        (("And if it does not come?", "If order {order} is not there after six working days, write to us and we start a search."),
         ("Who brings the parcel?", "The Coast Post brings order {order}, between 9 and 17 on working days.")),
        ("Where is my (order|parcel)?", "I would like to know when my order (comes|arrives).")),
    Intent("cancel_order", "orders", "order",
        ("(I want|I would like) to cancel (my order|order) {order}.", "(Can|Could) you (cancel|stop) order {order} (please|for me)?",
         "I ordered the {product} by mistake. (How do I cancel|Please cancel) {order}.",
         "I do not (want|need) order {order} any more.", "Please do not send order {order}, I (ordered the wrong thing|changed my mind)."),
        ("I changed my mind about {order} and do not want it any more.", "Order {order} should not be sent, please call it off."),
        ("You can cancel order {order} under My Orders until it is packed. After that, please send it back free of charge.",
         "As long as order {order} is not packed, you can cancel it under My Orders. Your money comes back within five working days."),
        (("What if it is packed already?", "Then let order {order} come and send it back free of charge within 30 days."),
         ("Does that cost me anything?", "No, to cancel order {order} is free.")),
        ("I (want|need) to cancel my order.", "Please stop my order.")),
    Intent("change_address", "orders", "order",
        ("I (moved|have moved) to {city}. (Can|Could) you change the address of order {order}?",
         "The address on order {order} is wrong, (it should go|please send it) to {city}.",
         "(How can I|Can I) send order {order} to {city} (instead|and not to my old address)?",
         "Order {order} must go to {city}, I gave the (wrong|old) address.", "(My street|My address) is wrong on {order}. I live in {city} now."),
        ("Please note that {order} has to go to {city} now.", "I gave the wrong street for {order}, I live in {city}."),
        ("You can change the address of order {order} to {city} under My Orders until it is packed.",
         "Open order {order} under My Orders and enter the new address in {city}. This works until the parcel is packed."),
        (("It is packed already. What now?", "Then the Coast Post keeps order {order} for seven days, and you can send it on to {city}."),
         ("Is {city} more expensive?", "No, we deliver to {city} at the same price."))),
    Intent("late_parcel", "delivery", "order",
        ("My parcel {order} is (late|much too late). It should have come on {day}.", "Order {order} was (promised|meant to come) on {day} and (nothing came|is still not here).",
         "I have been waiting for order {order} since {date}. (Where is it|What is going on)?",
         "You said {day}, and order {order} (has not come|is not there).", "How long (does it take|do I wait) until {order} comes? It was (meant for|promised for) {day}."),
        ("{day} has passed and there is no sign of {order}.", "How long must I wait for {order}? You said {day}."),
        ("Order {order} should have reached you on {day}. We start a search for it today, and you get an answer within two working days.",
         "A search for order {order} starts today. If it is not found within two working days, we send it again or pay back the money."),
        (("Can I have my money back instead?", "Yes, if order {order} is not found within two working days, you get the full price back."),
         ("How will I hear from you?", "We send you an e-mail about order {order} within two working days.")),
        ("My parcel is (late|still not here).", "My order should have come on {day}.")),
    Intent("damaged_item", "delivery", "product",
        ("The {product} from order {order} (arrived broken|{is} damaged|came with a crack).", "I opened the parcel {order} and the {product} {was} (broken|damaged).",
         "My {product} {is} (broken|scratched). The parcel came on {day} with order {order}.",
         "There is a (crack|hole) in the {product} that came with {order}.", "Order {order} came and the box was (wet|open). The {product} {is} broken."),
        ("There is a big dent in the {product} you sent me with {order}.", "Parcel {order} was crushed and so {was} the {product} in it."),
        ("Please send a photo of the {product} to care@harbourandpine.example with the number {order}. We send a new one or pay back {price} euros.",
         "With a photo of the {product} and the number {order} we can send you a new one free of charge. You may also choose the money."),
        (("Do I have to send the broken one back?", "No, you may keep or throw away the broken {product}."),
         ("How long does a new one take?", "A new {product} leaves our shop within two working days."))),
    Intent("delivery_cost", "delivery", "city",
        ("(How much is delivery to {city}|What does delivery to {city} cost)?", "What do you charge for (a parcel|sending a parcel) to {city}?",
         "Do you deliver to {city}, and (what does it cost|how much is it)?",
         "Is (delivery|shipping) to {city} free?", "(Tell me|I want to know) the price of (a delivery|shipping) to {city}."),
        ("I live in {city}. Is shipping free?", "Tell me the shipping price for {city}, please."),
        ("Delivery to {city} costs 4.90 euros, and it is free from 50 euros.", "We deliver to {city} for 4.90 euros. Orders from 50 euros are free of delivery costs."),
        (("Can it come tomorrow?", "Express delivery to {city} comes the next working day and costs 9.90 euros."),
         ("And can I collect it myself?", "Yes, you can collect it at the shop free of charge after two hours."))),
    Intent("return_item", "returns", "product",
        ("(I want|I would like) to (return|send back) the {product} from order {order}.", "(How do I|How can I) (return|send back) the {product}? The order was {order}.",
         "The {product} from {order} {is} not (right for me|what I wanted). (Can I return it|Can I give it back)?",
         "I do not (like|want) the {product} from order {order}.", "(Will you take|Can you take) the {product} back? The order is {order}."),
        ("I do not like the {product} I got with {order}. What can I do?", "Please take back my {product}, {order}."),
        ("You can return the {product} within 30 days if it is unused. Print the free label for order {order} under My Orders.",
         "Unused goods can come back within 30 days. The free label for the {product} is under My Orders, order {order}."),
        (("When do I get my money?", "The {price} euros come back within five working days after the {product} came back to us."),
         ("I have no printer.", "Then show the number {order} at the post counter; they print the label for you.")),
        ("I (want|would like) to return something.", "(How do|Can) I send something back?")),
    Intent("refund_status", "returns", "order",
        ("I sent back order {order} on {date}. (Where is my money|When do I get my money)?", "(Where is|When comes) my refund of {amount} euros for order {order}?",
         "You (still owe me|have not paid back the) {amount} euros for order {order}.",
         "There is no (refund|money) for order {order} on my account, it should be {amount} euros.", "I am waiting for the {amount} euros from (my return|the order) {order}."),
        ("My bank shows no refund for {order} yet, it was {amount} euros.", "I returned {order} and wait for {amount} euros."),
        ("A refund takes five working days after order {order} has reached us. It goes to the card or account you paid with.",
         "The refund for order {order} goes to the account you paid with, within five working days after the parcel has reached us."),
        (("It has been longer than that.", "Then please send us the post receipt of order {order}, and we look into it today."),
         ("Can I get a gift card instead?", "Yes, choose Gift Card under My Orders before the refund is paid."))),
    Intent("payment_failed", "payment", "amount",
        ("My (card|payment) was (refused|not accepted) when I wanted to pay {amount} euros.", "I cannot pay the {amount} euros for my {product}, the payment (fails|stops) every time.",
         "The payment of {amount} euros (did not work|failed). (What should I do|Was I charged)?",
         "Your shop does not (take|accept) my card for {amount} euros.", "I see an error when I (want to |try to |)pay {amount} euros."),
        ("The checkout shows an error and will not take my {amount} euros.", "Paying {amount} euros by card does not go through."),
        ("Nothing was taken when a payment of {amount} euros fails. Please wait ten minutes and try again, or use another card.",
         "Your {amount} euros were not charged. Try again after ten minutes, and ask your bank if it fails a second time."),
        (("Which ways to pay do you take?", "We take cards, bank transfer and gift cards."),
         ("Is my basket still there?", "Yes, your basket stays for seven days."))),
    Intent("invoice_copy", "payment", "order",
        ("(I need|Please send me) an invoice for order {order}.", "(Where do I find|Can I get) the (bill|invoice) for {order}?",
         "I need the invoice of {amount} euros for order {order} (for my taxes|for my office).",
         "(How can I|Where can I) print the invoice for {order}?", "My (office|boss) asks for a (bill|receipt) of order {order}."),
        ("My office wants a receipt for {order}.", "How can I print the bill that belongs to {order}?"),
        ("The invoice for order {order} is under My Orders as a PDF. You can also have it sent by e-mail.",
         "Open order {order} under My Orders and choose Invoice. It is a PDF that you can print or send on."),
        (("Can you put my company on it?", "Yes, enter the company name under My Account and open the invoice for {order} again."),
         ("How long can I get it?", "Invoices stay under My Orders for ten years.")),
        ("I need an invoice.", "(Where|How) do I get my bill?")),
    Intent("gift_card", "payment", "amount",
        ("I have a gift card of {amount} euros. (How long is it valid|When does it end)?", "(How do I|Where can I) use a gift card of {amount} euros?",
         "Can I pay for the {product} with a gift card of {amount} euros?",
         "I got a gift card with {amount} euros on it. (What now|Where can I use it)?", "Does a gift card of {amount} euros (end|run out) some day?"),
        ("Somebody gave me a card with {amount} euros on it. What can I do with it?", "Does my {amount} euro gift card ever run out?"),
        ("Your gift card of {amount} euros is valid for three years. Enter its code at the checkout or show it at the till.",
         "You can use the {amount} euros online or at the till, for three years. The rest stays on the card."),
        (("Where do I see what is left?", "The page Gift Cards shows what is left of your {amount} euros."),
         ("Can I have cash for it?", "No, a gift card cannot be paid out in cash."))),
    Intent("reset_password", "account", "",
        ("I forgot my password. (What now|What should I do)?", "(How do I|How can I) (reset|change) my password?", "I cannot log in (any more|since {day}). The password is (wrong|not accepted).",
         "My (login|account) does not work (since {day}|any more).", "I cannot get into my account, please help."),
        ("My login stopped working on {day}.", "Please help me to get into my account again."),
        ("Choose Forgot Password on the login page. You get a link by e-mail that works for one hour.",
         "On the login page, choose Forgot Password and open the link in our e-mail. The link works for one hour."),
        (("No mail has come.", "Please look in your spam folder and check that you used the right e-mail address."),
         ("The link is too old.", "Then choose Forgot Password again for a new link."))),
    Intent("change_email", "account", "",
        ("(How do I|How can I) change the (e-mail address|mail) of my account?", "I have a new e-mail address. (Where do I enter it|What do I have to do)?",
         "My old e-mail does not work (any more|since {date}). Please change it.",
         "I use another (e-mail|mail) since {date}. How can I change it?", "The (mail|e-mail) in my account is (old|wrong)."),
        ("Since {date} I use another mail address, where can I put it?", "My account still has my old mail in it."),
        ("Enter the new e-mail address under My Account and confirm it with the link that we send.",
         "Under My Account, choose E-mail and enter the new address. We send a link to confirm it."),
        (("Do I keep my points?", "Yes, your points and orders stay in your account."),
         ("I cannot log in at all.", "Then call us on 0555 0142 and have one order number ready."))),
    Intent("product_price", "products", "product",
        ("(How much {is} the {product}|What is the price of the {product})?", "What {does} the {product} cost (in your shop|online)?", "I (want|would like) to buy the {product}. (How much {is} {it}|What {does} {it} cost)?",
         "What would I (pay|have to pay) for the {product}?", "(Please tell me|I want to know) the price of the {product}."),
        ("Tell me what I would pay for {a_product}.", "{Is} the {product} expensive?"),
        ("The {product} cost{s} {price} euros. You find {them} in aisle {aisle}.", "You get the {product} for {price} euros, online or in aisle {aisle} of our shop."),
        (("And what is the {product} made of?", "The material of the {product} is {stuff}."),
         ("Is it cheaper in the shop?", "No, the {product} costs {price} euros online and in the shop.")),
        ("What does it cost?", "How much is it?")),
    Intent("product_care", "products", "goods",
        ("How (do|should) I (clean|look after) the {product}?", "(Can I wash|How do I wash) my {product}?", "My {product} {is} dirty. How do I clean {them}?",
         "What is the (right|best) way to (clean|wash) my {product}?", "There is (dirt|coffee|oil) on my {product}. What can I do?"),
        ("What is the best way to keep the {product} in good shape?", "There is a stain on my {product}, help!"),
        ("The {product} {is} made of {stuff}, so {care}.", "For the {product} the rule is simple: {care}. The material is {stuff}."),
        (("Can I use soap?", "A little mild soap does no harm to {stuff}."),
         ("What if I do it wrong?", "Bring the {product} to the service desk and we have a look at {them}."))),
    Intent("warranty", "products", "goods",
        ("How long is the warranty (of|on) the {product}?", "My {product} broke after a year. (Is there a warranty|Do I have a warranty)?", "{Does} the {product} have a (warranty|guarantee)?",
         "Will you repair the {product}? I bought {it} (last year|in spring).", "My {product} stopped working. (Who pays for the repair|Is that covered)?"),
        ("Will you repair my {product} for nothing?", "I bought the {product} a while ago and now {it} fail{s}."),
        ("The warranty of the {product} is {warranty}. Bring {them} to the service desk with the receipt or the order number.",
         "We give {warranty} of warranty on the {product}. Please bring {them} with the receipt or the order number."),
        (("I lost the receipt.", "The order number is enough, and you find it under My Orders."),
         ("How long does a repair take?", "A repair of the {product} takes about two weeks.")),
        ("Do I have a warranty?", "How long is the warranty?")),
    Intent("club_points", "club", "points",
        ("I have {points} points. (What are they worth|What can I do with them)?", "How much (money is|are) {points} Pine Club points?", "(Can I|How do I) use my {points} points?",
         "My (card|account) shows {points} points. (What are they good for|Is that a lot)?", "Do {points} points give me (a discount|money back)?"),
        ("Are {points} points enough for a discount?", "My card says {points} points, what do I get?"),
        ("Every 100 points are worth five euros, so {points} points are worth {worth} euros. Use them at the checkout.",
         "Your {points} points are worth {worth} euros. You can use them at the checkout or at the till."),
        (("Do they run out?", "Points are valid for two years."),
         ("How do I get more?", "You get one point for every euro you spend."))),
    Intent("club_join", "club", "",
        ("(How do I|How can I) join the (Pine Club|club)?", "What is the Pine Club, and (what does it cost|how do I join)?", "Do you have a (customer card|club)? I come every {day}.",
         "Is there a card for (good|regular) customers?", "I want to (be in|get into|sign up for) the Pine Club."),
        ("Is there a card for people who shop here every {day}?", "Sign me up for your club."),
        ("The Pine Club is free. Join under My Account or at the till, and you get one point for every euro.",
         "You can join the Pine Club free of charge at the till or under My Account. Every euro gives one point."),
        (("What is a point worth?", "You get five euros for 100 points."),
         ("Can my family use it?", "Yes, up to four people can share one card."))),
    Intent("prescription", "pharmacy", "prescription",
        ("My doctor sent you the prescription {prescription}. (When is it ready|When can I collect it)?", "Are my (medicines|tablets) for prescription {prescription} ready?",
         "I (want|would like) to collect prescription {prescription} on {day}.",
         "What do I (need|need to bring) when I collect prescription {prescription}?", "Can I (come|pick up my tablets) on {day}? The prescription is {prescription}."),
        ("Can I come on {day} for {prescription}?", "What do I have to bring for {prescription}?"),
        ("Prescription {prescription} is ready one working day after we get it. Please bring your health card to the pharmacy corner.",
         "We need one working day for prescription {prescription}. You can collect it in the pharmacy corner with your health card."),
        (("Can my neighbour collect it?", "Yes, with your health card and the number {prescription}."),
         ("Can you send it to me?", "No, medicines on prescription must be collected in the pharmacy corner."))),
    Intent("side_effects", "pharmacy", "remedy",
        ("I feel (sick|dizzy) since I took the {product}. (Is that normal|What should I do)?", "I have (a rash|a headache) from the {product}.", "{Does} the {product} have side effects?",
         "My (skin|stomach) is not well since I (use|take) the {product}.", "After the {product} I (feel bad|have a pain)."),
        ("After the {product} my skin itches.", "Ever since I use the {product} something is wrong with my stomach."),
        ("Please stop using the {product} until you have spoken to our pharmacist on 0555 0142. If you cannot breathe well, call 112.",
         "Do not take more of the {product} and call our pharmacist on 0555 0142. With trouble breathing or a swollen face, call 112."),
        (("Can I bring it back?", "Medicines cannot be returned, but we throw away the {product} safely for you."),
         ("When is the pharmacist there?", "Our pharmacist is there from Monday to Saturday, 9 to 18."))),
    Intent("dose", "pharmacy", "remedy",
        ("How (much|often) (can|may) I use the {product}(| every day)?", "How much of the {product} may a child of {age} take?", "I am {age}. What is the right dose of the {product}?",
         "How many times (a day|in a day) may I take the {product}?", "I lost the leaflet. How much of the {product} (do I take|is right)?"),
        ("How many times a day do I use the {product}?", "The leaflet of the {product} is lost. How much do I take?"),
        ("Please follow the leaflet of the {product} and never take more than it says. For children, ask our pharmacist on 0555 0142 first.",
         "The right dose of the {product} is in its leaflet. For a child or when you are unsure, call our pharmacist on 0555 0142."),
        (("I forgot a dose.", "Do not take two doses at once, and ask our pharmacist if you are unsure."),
         ("Where do I find the leaflet?", "The leaflet is on the page of the {product} as a PDF."))),
    Intent("storage", "pharmacy", "remedy",
        ("(How|Where) (do|should) I keep the {product}?", "{Does} the {product} belong in the fridge?", "(Can|May) I leave the {product} in (the car|the bathroom)?",
         "Is (heat|the sun) bad for the {product}?", "What is a good place (in my home|) for the {product}?"),
        ("It is hot here. Does that harm the {product}?", "What is the best place at home for the {product}?"),
        ("Keep the {product} dry, below 25 degrees and away from children.", "The {product} belong{s} in a dry place below 25 degrees, where children cannot reach it."),
        (("But it was hot all day.", "Then please do not use the {product} any more and bring {them} to us."),
         ("How long does it last?", "The date is on the pack of the {product}."))),
    Intent("emergency", "health", "",
        ("(My husband|My wife|My father|My mother) has (strong pain in the chest|chest pain) since {hour}.", "My (son|daughter|baby) (cannot breathe well|has swallowed tablets)! What should I do?",
         "(My wife|My husband|My friend) fell down at {hour} and (does not wake up|cannot speak).",
         "Help, my (father|mother|wife) can hardly (breathe|speak) since {hour}!", "(One arm|The face) of my (husband|mother) is (numb|strange) since {hour}."),
        ("Help, my father turned blue and can hardly breathe since {hour}!", "One side of my mother's face hangs down since {hour}."),
        ("This may be an emergency: please call 112 now. Stay with the person and do not give any medicine.",
         "Please call 112 at once. Do not wait, stay there and do what the people on the phone say."),
        (("What else can I do?", "Open the door for the helpers and stay on the phone with 112."),
         ("Should I drive to the hospital?", "Please do not drive; call 112, the ambulance is faster and safer.")),
        plain=True),
    Intent("vaccination", "health", "",
        ("Can I get a flu (shot|vaccination) (at your pharmacy|in your shop) on {day}?", "(I want|I would like) to book a flu (shot|vaccination).", "What does a flu vaccination cost, and (when can I come|do I need an appointment)?",
         "Do you give (vaccinations|flu shots) on a {day}?", "I want to be safe from the flu. (When can I come|Do you help)?"),
        ("Do you give the flu jab on a {day}?", "I am {age} and want to be safe from the flu."),
        ("We give flu vaccinations on Tuesday and Thursday from 14 to 18. They cost 25 euros, and you book under My Health.",
         "Flu vaccinations are on Tuesday and Thursday from 14 to 18 for 25 euros. Please book a time under My Health."),
        (("I have a cold. Can I come?", "With a fever, please wait until you are well again."),
         ("What do I bring?", "Please bring your health card and your vaccination book."))),
    Intent("pressure_check", "health", "",
        ("Can you (measure|check) my blood pressure (on {day}|)?", "(Do I need|Is there) an appointment for a blood pressure check?", "What does a blood pressure check cost? I am {age}.",
         "Can I just (come|walk in) for my blood pressure (on {day}|)?", "My doctor wants to know my blood pressure. (Do you measure it|Can I have it taken)?"),
        ("I want to know my blood pressure, can I just walk in on {day}?", "My doctor says I should have my pressure taken."),
        ("Our blood pressure check is free and takes ten minutes. Come to the pharmacy corner from 9 to 18, without an appointment.",
         "You can have your blood pressure checked in the pharmacy corner from 9 to 18. It is free and needs no appointment."),
        (("It was 150 at home.", "Please have it measured again here, and show the numbers to your doctor."),
         ("Do you sell a monitor?", "Yes, the Pulsekeeper pressure monitor costs 64.00 euros."))),
    Intent("opening_hours", "shop", "",
        ("(When|Until when) are you open on {day}?", "What are your opening hours (on {day}|this week)?", "Can I come to the shop on {day} at {hour}?",
         "When do you close on {day}?", "Is the shop (still |)open on {day} at {hour}?"),
        ("Is anybody there at {hour} on {day}?", "When do you close the doors on {day}?"),
        ("On {day} our shop is open from 9 to 19, and the pharmacy corner from 9 to 18.", "We are open from 9 to 19 on {day}. The pharmacy corner closes at 18."),
        (("And on Sunday?", "On Sunday the shop and the pharmacy corner are closed."),
         ("Where is the shop?", "Our shop is at 4 Quay Street, next to the old harbour."))),
    Intent("complaint", "shop", "",
        ("(A man|A woman|Somebody) at your till was (rude|very unfriendly) to me on {day}.", "I waited (40 minutes|an hour) at the service desk on {day}.", "I want to complain about your (staff|service) on {day}.",
         "I was treated (badly|like a thief) in your shop on {day}.", "Nobody (helped me|talked to me) at the desk on {day}."),
        ("The way I was treated on {day} was a shame.", "Nobody wanted to help me on {day} at {hour}."),
        ("What happened on {day} should not have happened. I pass it on to the shop manager, who answers you within two working days.",
         "Thank you for telling us about {day}. The shop manager reads this and answers you within two working days."),
        (("I want to talk to her myself.", "You reach the shop manager on 0555 0142."),
         ("Will anything change?", "Yes, we talk about every complaint in our morning meeting."))),
    Intent("praise", "shop", "",
        ("I want to thank (the woman|the man) at the service desk, who helped me so well on {day}.", "The {product} {is} (wonderful|great), I use {them} (every|each) day.", "Your team was so (kind|friendly) on {day}, (please tell them|thank you).",
         "I am very happy with the {product}.", "The (man|woman) in the pharmacy corner was (great|so helpful) on {day}."),
        ("I am so happy with my {product}.", "The pharmacist took so much time for me on {day}, that was great."),
        ("That is lovely to hear. I pass your kind words on to the team.", "That makes our day, and the team will be happy to read it."),
        (("Can I leave a review?", "Yes, you can write a review on our page."),
         ("See you soon!", "We look forward to seeing you."))),
]  # fmt: skip

GREETINGS = ("", "", "", "Hello, ", "Hi, ", "Good morning, ", "Dear team, ", "Good evening, ")
INTRODUCTIONS = ("this is {name}. ", "my name is {name}. ", "{name} here. ", "I am {name}. ")
REMARKS = {
    "neutral": ("",),
    "angry": ("This is (really|simply) not good enough.", "I am (really|very|so) angry.", "I have had enough of this!", "What a (bad|terrible) service!"),
    "worried": ("I am (a bit|quite|really) worried.", "This makes me nervous.", "I do not want to do anything wrong."),
    "happy": ("I (really like|love) your shop!", "Your shop is always a pleasure.", "I am a (big fan|happy customer) of yours."),
    "hurried": ("I have (only a minute|no time).", "Please be quick.", "Short answer, please."),
    "confused": ("I do not understand how this works.", "I am (a bit|quite) lost.", "Your page is hard to follow."),
}  # fmt: skip
OPENERS = {
    "neutral": ("Thank you for your message{comma_name}.", "Hello{comma_name}."),
    "angry": (
        "I am very sorry about this{comma_name}.",
        "I understand that you are upset{comma_name}, and I am sorry.",
    ),
    "worried": ("I understand your worry{comma_name}.", "It is good that you ask{comma_name}."),
    "happy": ("How nice to hear from you{comma_name}!", "Thank you for your kind words{comma_name}!"),
    "hurried": ("",),
    "confused": ("I am glad to explain it{comma_name}.", "Let us go step by step{comma_name}."),
}
ASK_FOR = {
    "order": (("It is {order}.", "The number is {order}.", "{order}", "I think it is {order}."),
              ("Could you give me your order number, please? It starts with HP.", "Please tell me the order number, it starts with HP.")),
    "product": (("It is the {product}, order {order}.", "The {product}. The order number is {order}.", "I mean the {product} from order {order}."),
                ("Which product is it, and what is the order number?", "Please tell me the product and the order number.")),
    "goods": (("It is the {product}.", "The {product}.", "I mean the {product}."), ("Which product do you mean?", "Please tell me which product it is.")),
}  # fmt: skip
GENERAL_FOLLOW_UPS = (
    ("Can I (speak|talk) to a person?", "Of course{comma_name}. Our care team is there on 0555 0142, from Monday to Saturday, 9 to 18."),
    ("(Where|How) can I write to you?", "You can write to care@harbourandpine.example, and we answer within one working day."),
    ("When are you open?", "Our shop is open from Monday to Saturday, 9 to 19."),
    ("Where is your shop?", "Our shop is at 4 Quay Street, next to the old harbour."),
    ("Do I need the app for that?", "No, you can do everything on our page, too."),
)  # fmt: skip
GOODBYES = (
    ("(Thanks|Thank you)(, that helps|, that is clear|)(.|!)", ("You are welcome{comma_name}. Have a good day!", "With pleasure{comma_name}. Have a good day!")),
    ("(Great|Perfect|Good), (thank you|thanks|I will do that).", ("You are welcome{comma_name}. Have a good day!", "With pleasure{comma_name}. Have a good day!")),
)  # fmt: skip
OTHERS = ("blood thinners", "heart tablets", "antibiotics", "allergy tablets", "iron tablets", "the pill", "insulin")

_CHOICE = re.compile(r"\(([^()|]*(?:\|[^()|]*)+)\)")
_SPACES = re.compile(r"  +")


def vary(phrase: str, rng: random.Random) -> str:
    """Choose one side of every ``(a|b)`` in a phrase, the inner ones first."""
    while "|" in phrase:
        phrase = _CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), phrase)
    return phrase


def fill(phrase: str, slots: dict[str, str], rng: random.Random) -> str:
    """Choose, put the slots in and tidy the spaces."""
    return tidy(vary(phrase, rng).format_map(slots))


def tidy(text: str) -> str:
    """Take out double spaces and the space before a mark that an empty choice leaves."""
    return _SPACES.sub(" ", text).replace(" ?", "?").replace(" .", ".").strip()


def order_number(rng: random.Random) -> str:
    """An order number such as HP-48213."""
    return f"HP-{rng.randrange(10000, 100000)}"


def first_name(rng: random.Random, invented: float = 0.1) -> str:
    """A first name from the list, or with a small chance one made of syllables."""
    if rng.random() < invented:
        return "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 2, 3)))).capitalize()
    return rng.choice(FIRST_NAMES)


def product_slots(product: Product) -> dict[str, str]:
    """The slots that a product fills."""
    many = product.name.endswith("s")
    article = "an" if product.name[0] in "AEIOU" else "a"
    measure = "pair" if product.name.endswith(("socks", "boots")) else "pack"
    return {
        "product": product.name, "price": product.price, "stuff": product.stuff, "care": product.care,
        "aisle": str(product.aisle), "warranty": product.warranty, "use": product.use,
        "a_product": f"a {measure} of {product.name}" if many else f"{article} {product.name}",
        "s": "" if many else "s", "is": "are" if many else "is", "was": "were" if many else "was",
        "does": "do" if many else "does", "Is": "Are" if many else "Is", "Does": "Do" if many else "Does", "it": "they" if many else "it", "them": "them" if many else "it",
    }  # fmt: skip


def common_slots(rng: random.Random) -> dict[str, str]:
    """Dates, amounts, places and numbers, drawn afresh."""
    points = rng.randrange(1, 20) * 100
    return {
        "order": order_number(rng),
        "prescription": f"RX-{rng.randrange(1000, 10000)}",
        "day": rng.choice(DAYS),
        "date": f"{rng.randrange(1, 29)} {rng.choice(MONTHS)}",
        "hour": f"{rng.randrange(9, 18)}:{rng.choice(('00', '15', '30', '45'))}",
        "amount": f"{rng.randrange(5, 200)}.{rng.choice(('00', '50', '90', '20'))}",
        "city": rng.choice(CITIES),
        "points": str(points),
        "worth": str(points // 20),
        "age": str(rng.randrange(3, 88)),
        "other": rng.choice(OTHERS),
    }


def misspell(text: str, rng: random.Random) -> str:
    """Put one or two slips into small words; names, products and numbers stay as they are."""
    words = text.split(" ")
    places = [i for i, word in enumerate(words) if len(word) > 3 and word.isalpha() and word.islower()]
    for place in rng.sample(places, min(len(places), rng.choice((1, 1, 2)))):
        word = words[place]
        at = rng.randrange(1, len(word) - 1)
        slip = rng.randrange(3)
        if slip == 0:
            words[place] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        elif slip == 1:
            words[place] = word[:at] + word[at + 1 :]
        else:
            words[place] = word[:at] + word[at] + word[at:]
    return " ".join(words)


@dataclass
class Writer:
    """Writes conversations and remembers every list of user turns, so that none comes twice."""

    rng: random.Random
    seen: set[str] = field(default_factory=set)

    def _slots(self, intent: Intent) -> dict[str, str]:
        shelf = {"goods": GOODS + DEVICES, "remedy": REMEDIES}.get(intent.needs, EVERYTHING)
        if intent.category == "returns":
            shelf = GOODS + DEVICES
        return common_slots(self.rng) | product_slots(self.rng.choice(shelf))

    def _user(self, phrase: str, slots: dict[str, str], typos: float = 0.14) -> str:
        text = fill(phrase, slots, self.rng)
        return misspell(text, self.rng) if self.rng.random() < typos else text

    def _first_question(self, core: str, mood: str, name: str, slots: dict[str, str]) -> str:
        rng = self.rng
        opening = rng.choice(GREETINGS) + (rng.choice(INTRODUCTIONS) if name else "")
        if opening and not name:
            core = core if core.startswith(("I ", "{")) else core[:1].lower() + core[1:]
            core = core if not core.startswith("(") else _lower_choice(core)
        remark = rng.choice(REMARKS[mood])
        parts = [core, remark] if rng.random() < 0.6 or (opening and not name) else [remark, core]
        text = fill(opening + " ".join(parts), slots, rng)
        text = text[:1].upper() + text[1:]
        return misspell(text, rng) if rng.random() < 0.14 else text

    def _answer(self, phrases: tuple[str, ...], mood: str, slots: dict[str, str], plain: bool = False) -> str:
        opener = "" if plain else self.rng.choice(OPENERS[mood]) + " "
        return fill(opener + self.rng.choice(phrases), slots, self.rng)

    def conversation(self, intent: Intent, split: str) -> dict[str, object]:
        """One new conversation about an intent, with a question that no other conversation has."""
        while True:
            row = self._attempt(intent, split)
            questions = [turn["content"] for turn in row["messages"] if turn["role"] == "user"]
            first, every = (" ".join(text.casefold().split()) for text in (questions[0], " / ".join(questions)))
            if first in self.seen or every in self.seen:
                continue
            self.seen.update((first, every))
            return row

    def _attempt(self, intent: Intent, split: str) -> dict[str, object]:
        rng = self.rng
        moods = {"emergency": "worried", "praise": "happy"}
        mood = moods.get(intent.name) or rng.choices(list(MOODS), list(MOODS.values()))[0]
        if intent.name == "complaint":
            mood = rng.choice(("angry", "neutral", "worried"))
        name = first_name(rng) if rng.random() < 0.5 or not intent.needs else ""
        slots = self._slots(intent) | {"name": name, "comma_name": f", {name}" if name else ""}
        long = rng.random() < 0.18
        phrasings = intent.held_out if split == "test" and rng.random() < 0.5 else intent.questions
        messages: list[dict[str, str]] = []

        def say(user: str, assistant: str) -> None:
            messages.append({"role": "user", "content": user})
            messages.append({"role": "assistant", "content": assistant})

        if long and intent.vague and rng.random() < 0.6:
            kind = "goods" if intent.name in ("product_price", "warranty") else intent.needs
            replies, requests = ASK_FOR[kind]
            say(self._first_question(rng.choice(intent.vague), mood, name, slots), self._answer(requests, mood, slots))
            say(self._user(rng.choice(replies), slots, 0.0), self._answer(intent.answers, mood, slots, plain=True))
        else:
            question = self._first_question(rng.choice(phrasings), mood, name, slots)
            say(question, self._answer(intent.answers, mood, slots, plain=intent.plain))
        if long:
            turns = rng.choices((3, 4, 5), (72, 22, 6))[0]
            own = rng.sample(intent.follow_ups, 2)
            general = rng.sample(GENERAL_FOLLOW_UPS, 2)
            for question, answer in (own + general)[: turns - 1 - len(messages) // 2]:
                say(self._user(question, slots), fill(answer, slots, rng))
            question, answers = rng.choice(GOODBYES)
            if intent.plain:
                question, answers = "(Thanks|Thank you).", ("Please stay on the phone with 112.",)
            say(self._user(question, slots), fill(rng.choice(answers), slots, rng))
        return {"category": intent.category, "intent": intent.name, "mood": mood, "messages": messages}


def _lower_choice(core: str) -> str:
    """Lower the first letters of a leading choice, all but those of the word I."""
    head, _, tail = core.partition(")")
    sides = [
        side if side.startswith(("I ", "I'")) or side == "I" else side[:1].lower() + side[1:]
        for side in head[1:].split("|")
    ]
    return f"({'|'.join(sides)}){tail}"


def conversations(seed: int = DEFAULT_SEED) -> dict[str, list[dict[str, object]]]:
    """All splits; the intents take turns so that each split holds all of them about equally often."""
    rng = random.Random(seed)
    writer = Writer(rng)
    splits: dict[str, list[dict[str, object]]] = {}
    number = 0
    for split in ("test", "validation", "train"):
        rows = [writer.conversation(INTENTS[i % len(INTENTS)], split) for i in range(SPLIT_SIZES[split])]
        rng.shuffle(rows)
        splits[split] = []
        for row in rows:
            number += 1
            splits[split].append({"id": f"demo-{number:06d}", **row})
    return splits


# The plain text that the base model reads. No turns and no questions with answers: reports, notes, articles.

ARTICLES = {
    "delivery": ("A parcel (usually|mostly|) takes two to four working days.", "Delivery costs 4.90 euros(, whatever the town|, to {city} as well as to {city2}|).", "From 50 euros on, delivery is free.", "Express delivery comes the next working day and costs 9.90 euros.", "The Coast Post brings (all|our) parcels between 9 and 17 on working days.", "An order can be collected at the shop free of charge after two hours.", "When a parcel is six working days late, we start a search for it.", "The page My Orders shows (every step|where a parcel is)."),
    "orders": ("An order can be cancelled under My Orders until it is packed.", "The address of an order can be changed until the parcel is packed.", "Once it is paid, nothing can be added to an order.", "Two orders are packed together where we can(, and delivery is paid once|).", "Every order has a number that starts with HP and has five digits, such as {order}.", "Some orders travel in two parcels.", "The Coast Post keeps a parcel for seven days."),
    "damage and loss": ("When something arrives broken, a photo and the order number are enough.", "The customer may choose between a new one and the money.", "A new one leaves our shop within two working days.", "Nobody has to send a broken thing back.", "A missing item may be in a second parcel, so we wait two days and then send it again free of charge.", "If a parcel is not found within two working days, the full price is paid back."),
    "returns": ("Unused goods can be returned within 30 days.", "The label for the parcel is free and can be printed under My Orders.", "Those who have no printer show the order number at the post counter.", "A refund takes five working days after the parcel has reached us.", "The money goes to the card or account that was used to pay.", "An exchange is free once.", "Medicines cannot be returned, but the pharmacy corner throws old ones away safely."),
    "payment": ("The shop takes cards, bank transfer and gift cards.", "When a payment fails, nothing is taken.", "It helps to wait ten minutes and to try again, or to use another card.", "A second payment on the account is often only held and comes free within three working days.", "Every invoice is kept under My Orders as a PDF for ten years.", "A gift card is valid for three years and cannot be paid out in cash.", "The rest of the money stays on the gift card.", "A basket stays for seven days."),
    "accounts": ("Those who forget the password choose Forgot Password on the login page.", "The link in the e-mail works for one hour.", "A new e-mail address is entered under My Account and confirmed with a link.", "An account can be deleted under My Account, Privacy.", "All data is erased after 30 days, except invoices.", "Points and orders stay in the account when the e-mail address changes."),
    "the Pine Club": ("The Pine Club is free.", "Every euro gives one point, and 100 points are worth five euros.", "So {points} points are worth {worth} euros.", "Points stay valid for two years.", "Up to four people can share one card.", "Customers join at the till or under My Account.", "Points can be used at the checkout."),
    "prescriptions": ("A prescription is ready one working day after we get it.", "Its number starts with RX, such as {prescription}.", "The health card is needed to collect it in the pharmacy corner.", "A neighbour may collect it with the health card and the number.", "Medicines on prescription are never sent by post."),
    "safe medicines": ("Nobody should take more of a medicine than the leaflet says.", "Our pharmacist checks free of charge which medicines go together.", "People who take {other} should ask the pharmacist first.", "A rash or an itch is a reason to stop and to call the pharmacist on 0555 0142.", "With trouble breathing or a swollen face, 112 is the right number.", "Medicines belong in a dry place below 25 degrees, away from children.", "Two doses at once are never a good idea.", "A list of all medicines helps the pharmacist.", "Those who feel sick or dizzy for longer than three days should see a doctor."),
    "emergencies": ("With chest pain, or when somebody cannot breathe or speak, call 112 at once.", "Stay with the person and do not give any medicine.", "The people on the phone say what to do.", "An ambulance is faster and safer than a car.", "Open the door for the helpers.", "One side of the face that hangs down may be a stroke."),
    "health checks": ("Flu vaccinations are given on Tuesday and Thursday from 14 to 18.", "A vaccination costs 25 euros and is booked under My Health.", "Please bring the health card and the vaccination book.", "With a fever, it is better to wait.", "Blood pressure is checked free of charge in ten minutes, without an appointment.", "An appointment can be moved or cancelled under My Health up to one day before."),
    "the shop": ("The shop is open from Monday to Saturday, from 9 to 19.", "The pharmacy corner closes at 18.", "On Sunday everything is closed.", "The shop stands at 4 Quay Street, next to the old harbour.", "The car park is behind the shop on Mill Lane, and the first two hours are free.", "Each further hour costs two euros.", "Bikes stand in front of the shop.", "The care team can be called on 0555 0142 from 9 to 18.", "Letters to care@harbourandpine.example are answered within one working day.", "The shop manager reads every complaint."),
}  # fmt: skip
ARTICLE_HEADS = (
    "About {topic}",
    "Notes on {topic}",
    "{topic}: what to know",
    "How we handle {topic}",
    "A short guide to {topic}",
    "Staff handbook, {topic}",
)
ARTICLE_GLUE = (
    "(Please note:|Remember:|One more thing:)", "(It is simple:|In short:|As a rule:)", "", "", "", "", "", "", "(Here|At Harbour & Pine) the rule is clear.", "(New|Our) staff should (know|learn) this by heart.",
    "This has been so since the (first year|spring|old days).", "(It saves time for everybody.|It makes life easier.|Customers like that.)", "{name} wrote this page on {date}.", "(Many|Some) people do not know this.",
)  # fmt: skip
PRODUCT_LINES = (
    "The {product} cost{s} {price} euros.", "You find the {product} in aisle {aisle}.", "The {product} {is} made of {stuff}.", "To look after the {product}, {care}.", "The warranty of the {product} is {warranty}.", "The {product} {is} (good|made|just right) for {use}.",
    "Those who look for something for {use} (like|often choose|come back for) the {product}.", "At {price} euros, the {product} {is} one of the things that (people give to friends|sell best in {month}|go quickly).",
    "Our {product} stand{s} in aisle {aisle}, next to the {product2}.", "The {product} cost{s} {price} euros, while the price of the {product2} is {price2} euros.", "Because of the {stuff}, the {product} last{s} long and {is} easy to keep.",
    "{name} bought {a_product} on {day} and (loves {them}|came back for more|gave {them} to {name2}).", "We give {warranty} of warranty on the {product}.", "The rule for the {product} is: {care}.", "The {product} {was} first sold in {month} and still cost{s} {price} euros.",
    "The {product} come{s} in a box with a small card that says: {care}.", "Nothing is better for {use} than the {product}.", "For {use}, many customers (use|buy|like) the {product}.",
)  # fmt: skip
CASE_LINES = (
    "{name} (was angry|was worried|was calm|was in a hurry|was friendly|did not understand how it works) and (said so|told us why|asked for help).", "{name} ordered the {product} on {date} with the number {order}.", "Order {order} was for {name} and held {a_product}.",
    "The parcel {order} (was sent|left the shop|came back|was late|was found) on {day}.", "We told {name} that order {order} can be followed under My Orders.", "The {product} from order {order} {was} (broken|too small|missing|scratched|fine).", "{name} sent a photo of the {product}.",
    "The price of the {product}, {price} euros, was paid back to {name}.", "{name} lives in {city}, so {order} went to {city}.", "In {city}, {name} waited for the {product}.", "The Coast Post brought {order} to {city} on {day}.", "{name} had been charged {amount} euros, and the {amount} euros came free on {day}.",
    "On {day} at {hour}, {name} called again about {order}.", "{name} came to the shop on {day} at {hour} and asked for {name2}.", "{name2} looked up {order} and found the {product}.", "{name2} wrote to {name} that {a_product} would come on {day}.", "{name} thanked {name2} for the help with {order}.",
    "The invoice for {order}, {amount} euros, was sent to {name} once more.", "{name} wanted to (cancel|change|return) order {order}, and {name2} explained how.", "A label for order {order} was printed for {name}.", "{name2} said sorry to {name} for the trouble with order {order}.", "Prescription {prescription} for {name} was ready on {day}, and {name} collected {prescription} at {hour}.",
    "{name} has {points} points, and {points} points are worth {worth} euros.", "Because {name} takes {other}, the pharmacist checked {other} and the {remedy}.", "{name} got the {remedy} on {day}.", "{name} asked {name2} whether the {product} {was} in aisle {aisle}, and {it} {was}.",
    "The note on the box said {order}, {name}, {city}.", "So {name} got the {product} on {day}.", "The case of {name} was closed on {date}.", "It was about the {product} and not about the {product2}.",
)  # fmt: skip
STORY_LINES = (
    "The (morning|day|evening) was (grey|bright|cold|mild|windy), and (the harbour was quiet|gulls sat on the roof|the first ferry came in late|the market was full).", "{name} opened the shop at (nine|eight|half past eight) and (made tea|lit the lamps|swept the floor|read the post).", "Rain (fell|ran down the windows) until noon, so (nobody came|we sold many umbrellas|{name} put the {product} in the window).",
    "A (woman|man|girl|boy|couple) from {city} (asked for|looked at|bought|carried home) the {product}.", "{name} and {name2} (packed parcels|carried boxes|counted the stock|cleaned the shelves) (all morning|until lunch|after work).", "By noon {name} had packed {count} parcels, and {name2} had packed {count2}.", "In {month} the (boats|ferries|buses) go only (twice a day|in the morning), and {city} feels far away.",
    "{name} told {name2} about (the old days|a trip to {city}|the storm of {month}|a new book).", "{name2} listened to {name} and (laughed|nodded|said nothing|poured more tea).", "There is (a bench|an old tree|a small lamp) in front of the shop where {name} likes to sit.", "The pharmacist (checked|sorted|counted) the (tablets|drops|creams) and (wrote a list|hummed a song|spoke with a worried father).",
    "A child had (a small cut|a fever|a cough), and the pharmacist (stayed calm|was kind|gave good advice).", "People say that (good service|a kind word|patience) is worth more than a low price.", "When somebody is angry, we listen first, say sorry, and then (look for a way|find out what went wrong).", "When somebody is worried, we explain it step by step and do not hurry.",
    "{name} learned to (tie parcels|use the till|read the leaflets) from {name2}.", "The dog of {name} slept under the table next to a box with the {product2}.", "At {hour} the phone rang, and {name2} wrote down the number {order}.", "On the way home {name} met {name2} near (the old harbour|Mill Lane|Quay Street).", "The (sea|sky|light) was (green|silver|dark|wide) that day.", "Nobody knew what {name} had (lost|found|planned), but {name2} had an idea.",
    "Where was the parcel {order}, and who had seen it?", "How much would the {product} cost in {city}?", "What should one do on such a {day}?", "When would {name} come back from {city}?", "Can a shop be happy, thought {name2}.", "My life is simple, said {name}, my shop is my house.",
    "Hello, said {name}, and good morning, said {name2}.", "My name is {name}, said the (woman|man|girl), and this is my {product}.", "I would like to (go to {city}|read all day|have a dog), said {name}.", "Yes, said {name}, and {name2} said no.", "Then {name} took the number {order} and (looked it up|wrote it down).",
    "How quickly a week goes by!", "What would the shop be without {name}?", "I think that {name} is right about the {product}.", "I am sure we can do it, said {name}.", "You can see the lighthouse from the door when the air is clear.", "Have you ever seen such a {day}, asked {name2}, and {name} had not.",
)  # fmt: skip
NOTICE_LINES = (
    "Dear {name}, (we hope you are well|it is nice to write to you|here is some news from the shop).", "We are very sorry about the (delay|noise|mistake) on {day}.", "Thank you for your patience(, {name}|).", "You can (see|find|change) (this|everything) under My (Orders|Account|Health).", "Please bring your (health card|receipt|order number) when you come on {day}.", "If you are not sure, please call us on 0555 0142.",
    "Please write to care@harbourandpine.example when something is wrong.", "Your parcel {order} waits for you at the shop, {name}.", "We look forward to seeing you on {day} at {hour}.", "I am glad that the {product} came in time, {name}.", "We understand that you were worried, {name}, and we want to do better.", "It was good of you to ask, {name}.", "You have {points} points left.", "Have a good week!",
    "Your {name2}, for the team of Harbour & Pine.", "Choose (Invoice|Exchange|Cancel|Privacy|E-mail) under My (Orders|Account|Health) and go on from there.", "Open the page My (Orders|Account) and enter your new address in {city}.", "Your order {order} is a good one, {name}.", "Prescription {prescription} is for {name}.", "Order {order} is for {name2}, and {name2} knows it.",
    "Thank you for your (message|letter|kind words), {name}.", "Hello {name}, and good evening to all of you.", "I am {name2}, and I work at the service desk.", "My order {order} was late once too, wrote {name2}, and I was angry.", "Please send a photo, {name}.", "With pleasure we tell you that the {product} {is} back.",
    "You do not need to do anything about order {order}.", "I have no time today, but on {day} I will be at the till.", "With a Pine Club card you pay less for the {product}.", "How nice that {name2} will visit us again!", "I do not know when the {product2} will be back.", "My mother likes the {remedy}, and my father wants to try it too.",
)  # fmt: skip

# What customers came with, and what they heard. A report retells both, so that the base learns which matter belongs
# to which rule: the customer's own words, the matter as others tell it, and the outcome.
REPORTS = (
    (("I do not know where {order} is", "I wonder where my parcel with the number {order} has got to", "there is nothing new about {order}", "I am waiting for the {product} from {order}"),
     ("where order {order} was", "whether {order} had been sent", "about the way of {order}"),
     ("order {order} can be followed under My Orders", "the page My Orders shows every step of order {order}, and that most parcels arrive within two to four working days")),
    (("I do not need {order} any longer", "{order} was a mistake, so please do not send it", "I want to cancel {order}", "stop {order} before it leaves"),
     ("to cancel order {order}", "to have order {order} stopped", "to take order {order} back before it was sent"),
     ("order {order} can be cancelled under My Orders until it is packed", "a packed order such as {order} is sent back free of charge, and that the money comes back within five working days")),
    (("I live in {city} now", "I moved, and {order} should go to {city}", "the street on {order} is an old one, {city} is right", "send {order} to my new home in {city}"),
     ("for another address on order {order}", "to have {order} sent to {city}", "how {order} could go to {city}"),
     ("the address of order {order} can be changed to {city} under My Orders until the parcel is packed", "the new address in {city} is entered under My Orders, before {order} is packed")),
    (("I forgot to put {a_product} into {order}", "there should be one more thing in {order}, the {product}", "can {a_product} still go with {order}", "I want to change what is in {order}"),
     ("to add {a_product} to order {order}", "for {a_product} on top of {order}", "to change order {order}"),
     ("an order cannot be changed once it is paid, so that a new order for the {product} is the way", "the {product} can be ordered on the side and is packed together with {order} where we can")),
    (("{order} should have been here on {day}", "{day} is over and {order} is not here", "my parcel {order} is late", "you promised {order} for {day}, and I wait and wait"),
     ("why {order} had not come on {day}", "about parcel {order}, which was late", "what had become of {order}, promised for {day}"),
     ("a search for order {order} starts today, with an answer within two working days", "if {order} is not found within two working days, we send it again or pay back the money")),
    (("the {product} in {order} came broken", "there is a crack in my {product} from {order}", "the box of {order} was wet and bent, and the {product} damaged", "my {product} arrived scratched, {order}"),
     ("about the {product} from {order}, broken on the way", "what to do with a damaged {product}", "for help with a {product} that came in pieces"),
     ("a photo of the {product} and the number {order} are enough for a new one", "a photo should go to care@harbourandpine.example, and that we send a new {product} or pay back {price} euros")),
    (("the {product} was not in the box of {order}", "{order} is here, but the {product} is missing", "I paid for {a_product} that is not in {order}", "something is missing in {order}, namely the {product}"),
     ("where the {product} was that belonged in {order}", "about the missing {product}", "why {order} came without the {product}"),
     ("some orders travel in two parcels, and that the {product} from {order} may be in the second one", "after two days the missing {product} is sent again free of charge")),
    (("what does it cost to send something to {city}", "is delivery free when one lives in {city}", "tell me the price of a parcel to {city}", "do you ship to {city}"),
     ("what delivery to {city} costs", "for the shipping price to {city}", "whether a parcel to {city} is free"),
     ("delivery to {city} costs 4.90 euros and is free from 50 euros", "we deliver to {city} for 4.90 euros")),
    (("I do not want to keep the {product} from {order}", "the {product} is not what I thought", "I want to send back the {product}, {order}", "take the {product} back, please"),
     ("to return the {product}", "how to send back the {product} from {order}", "whether we take back the {product}"),
     ("unused goods such as the {product} can be returned within 30 days", "the free label for order {order} can be printed under My Orders")),
    (("the {product} is too small", "I need the {product} in another size", "the colour of the {product} is wrong, can I swap it", "I want to exchange my {product}, {order}"),
     ("to exchange the {product}", "for the {product} in a different size", "to swap the {product} for another colour"),
     ("the {product} is exchanged once free of charge", "one chooses Exchange for order {order} under My Orders and sends the old one back within 30 days")),
    (("I returned {order} and have no money yet", "the {amount} euros for {order} have not come back", "when do I get my refund for {order}", "my bank has seen nothing of the {amount} euros for {order}"),
     ("about the refund for {order}", "where the {amount} euros for the returned order {order} were", "when the money for {order} comes back"),
     ("a refund takes five working days after order {order} has reached us", "the money goes to the card or account that was used to pay")),
    (("the card was refused at {amount} euros", "I cannot pay the {amount} euros, there is an error", "my payment of {amount} euros does not work", "the checkout did not take my card"),
     ("why a payment of {amount} euros had failed", "how to pay {amount} euros after an error at the checkout", "about a card that was not accepted"),
     ("nothing is taken when a payment of {amount} euros fails", "it helps to wait ten minutes and try again, or to use another card")),
    (("{order} was taken from my account two times", "I paid {amount} euros twice for {order}", "there is a second payment of {amount} euros", "you charged me double for {order}"),
     ("why {order} had been charged twice", "about a second payment of {amount} euros for {order}", "why {amount} euros were gone two times"),
     ("the second {amount} euros for order {order} are only held and not taken", "the second payment comes free within three working days")),
    (("I need the invoice for {order} for my office", "send me the bill of {order}", "I have lost the receipt of {order}", "where do I find the invoice of {order}"),
     ("for an invoice for {order}", "for a copy of the bill for {order}", "where the receipt for {order} could be printed"),
     ("the invoice for order {order} is under My Orders as a PDF", "the invoice can also be sent by e-mail")),
    (("I was given a gift card of {amount} euros", "how long is my {amount} euro gift card good", "where do I use a gift card with {amount} euros on it", "my gift card of {amount} euros is a year old"),
     ("how long a gift card of {amount} euros is valid", "what to do with a gift card of {amount} euros", "about a gift card"),
     ("a gift card of {amount} euros is valid for three years", "its code is entered at the checkout or shown at the till")),
    (("I forgot my password", "I cannot get into my account", "the login does not take my password any more", "I am locked out since {day}"),
     ("how to get into the account without the password", "for a new password", "for help with the login"),
     ("one chooses Forgot Password on the login page", "the link that comes by e-mail works for one hour")),
    (("I have a new e-mail address", "my old mail is still in my account", "how do I change the address for my e-mails", "please use my other mail from now on"),
     ("to change the e-mail address of the account", "where to enter a new mail", "how to get rid of an old e-mail address"),
     ("the new e-mail address is entered under My Account and confirmed with a link", "a new mail in the account needs the link that we send")),
    (("I want to delete my account", "please erase my data", "I do not want to be a customer any longer", "close my account and forget me"),
     ("to delete the account", "to have all data erased", "how to leave for good and take the data away"),
     ("an account is deleted under My Account, Privacy", "the data is gone after 30 days, and that invoices must be kept for ten years")),
    (("what does the {product} cost", "I want to know the price of the {product}", "is the {product} cheap", "how much do you take for {a_product}"),
     ("for the price of the {product}", "what one pays for {a_product}", "how much the {product} cost"),
     ("the {product} cost{s} {price} euros", "the price of the {product} is {price} euros, in aisle {aisle}")),
    (("how do I clean the {product}", "my {product} got dirty, there is a stain", "I want to keep the {product} beautiful", "how should one look after the {product}"),
     ("how to look after the {product}", "how to clean the {product}", "about the care of the {product}"),
     ("the {product} {is} made of {stuff}, so {care}", "the rule is: {care}")),
    (("is there a warranty on the {product}", "my {product} broke after some months", "do you repair the {product} free of charge", "the {product} does not work any more, and I bought it last year"),
     ("about the warranty of the {product}", "whether the {product} would be repaired", "how long the warranty on the {product} is"),
     ("the warranty of the {product} is {warranty}", "one brings {them} to the service desk with the receipt or the order number")),
    (("do you have the {product} in stock", "is there {a_product} left in the shop", "I want to come on {day} and buy the {product}", "is the {product} sold out"),
     ("whether the {product} {was} in stock", "if there {was} {a_product} left", "for the last {product} on the shelf"),
     ("the page of the {product} shows how many are left in the shop", "one can reserve {them} for one day, and that {it} stand{s} in aisle {aisle}")),
    (("I have {points} points", "what do I get for {points} points", "how much are {points} points worth", "there are {points} points on my card, is that a discount"),
     ("what {points} points are worth", "how to use {points} points", "about the {points} points on the card"),
     ("every 100 points are worth five euros, so that {points} points are worth {worth} euros", "points are used at the checkout")),
    (("how do I join the club", "I want a Pine Club card", "I come every {day}, can I be a member", "what does the club cost"),
     ("how to join the Pine Club", "to be a member of the club", "for a card for people who shop here often"),
     ("the Pine Club is free", "one joins under My Account or at the till and gets one point for every euro")),
    (("my doctor sent you {prescription}", "is {prescription} ready", "I want to collect {prescription} on {day}", "what do I need for my prescription {prescription}"),
     ("when prescription {prescription} would be ready", "what to bring for {prescription}", "to collect {prescription}"),
     ("prescription {prescription} is ready one working day after we get it", "the health card is needed in the pharmacy corner")),
    (("I feel sick since I took the {remedy}", "my skin itches and is red after the {remedy}", "the {remedy} does not do me good, I am dizzy", "I have a bad stomach from the {remedy}"),
     ("what to do after feeling unwell with the {remedy}", "about a rash from the {remedy}", "whether it is normal to feel dizzy from the {remedy}"),
     ("nobody should go on using the {remedy} before speaking to the pharmacist on 0555 0142", "one should stop using the {remedy} and ask the pharmacist, and call 112 when breathing is hard")),
    (("I take {other}, can I use the {remedy} as well", "do the {remedy} and {other} go together", "is it safe to mix {other} with the {remedy}", "my doctor gave me {other}"),
     ("whether the {remedy} and {other} go together", "about the {remedy} next to {other}", "to take the {remedy} together with {other}"),
     ("the {remedy} should not be taken with {other} before our pharmacist has checked it", "the pharmacist on 0555 0142 checks {other} and the {remedy} first")),
    (("how much of the {remedy} may I take", "how often a day does one use the {remedy}", "I lost the leaflet of the {remedy}", "is one spoon of the {remedy} enough"),
     ("how much of the {remedy} to take", "how many times a day to use the {remedy}", "for the right dose of the {remedy}"),
     ("the leaflet of the {remedy} says how much, and that nobody should ever take more", "for children one asks our pharmacist on 0555 0142 first")),
    (("where do I keep the {remedy} at home", "it is so warm here, is that bad for the {remedy}", "can the {remedy} stand in the sun", "does the {remedy} go into the fridge"),
     ("where to keep the {remedy}", "how the {remedy} should be stored", "whether heat harms the {remedy}"),
     ("the {remedy} is kept dry, below 25 degrees and away from children", "the {remedy} belongs in a dry place below 25 degrees, where children cannot reach it")),
    (("I need something for {remedy_use}", "what helps with {remedy_use}", "my son suffers from {remedy_use}", "which medicine is good for {remedy_use}"),
     ("for something against {remedy_use}", "what helps with {remedy_use}", "which of our products was right for {remedy_use}"),
     ("many customers use the {remedy} for {remedy_use}", "the {remedy} is for {remedy_use}, and that one should see a doctor if it lasts longer than three days")),
    (("my father cannot breathe and is blue", "my wife has pain in the chest since {hour}", "her face hangs down on one side", "my mother does not wake up and cannot speak"),
     ("what to do about a pain in the chest", "for help for somebody who could hardly breathe", "about a face that hung down on one side since {hour}"),
     ("this may be an emergency and 112 must be called at once", "one should call 112 now, stay with the person and not give any medicine")),
    (("I want a flu shot", "can I get a vaccination on {day}", "my grandmother needs the flu jab", "I am afraid of the flu this winter"),
     ("for a flu vaccination", "when the flu shot is given", "to be safe from the flu"),
     ("flu vaccinations are given on Tuesday and Thursday from 14 to 18", "a vaccination costs 25 euros and is booked under My Health")),
    (("can you check my blood pressure", "I want to have my pressure measured on {day}", "my doctor wants me to watch my blood pressure", "may I just walk in to have my pressure taken"),
     ("for a blood pressure check", "to have the blood pressure taken on {day}", "whether one can walk in for a pressure check"),
     ("the blood pressure check is free and takes ten minutes", "one comes to the pharmacy corner from 9 to 18, without an appointment")),
    (("I have an appointment on {day} at {hour} and cannot come", "{day} at {hour} is not possible for me any more", "can my appointment be later", "I must work on {day} at {hour}"),
     ("to move the appointment on {day} at {hour}", "for another time than {day} at {hour}", "to come later than {hour} on {day}"),
     ("the appointment on {day} at {hour} can be moved under My Health, up to one day before", "an appointment is moved under My Health")),
    (("are you open on {day}", "when do you close on {day}", "can I come at {hour} on {day}, is somebody there", "how long is the shop open"),
     ("when we open on {day}", "until when the shop is open on {day}", "whether the doors are open at {hour}"),
     ("on {day} the shop is open from 9 to 19, and the pharmacy corner from 9 to 18", "we are open from 9 to 19 on {day}")),
    (("where can I leave my car", "I come from {city} by car", "is there a car park", "can I park near the shop on {day}"),
     ("where to park", "for a place for the car on {day}", "about parking"),
     ("one can park behind the shop, free for two hours", "the way in to the car park is on Mill Lane")),
    (("somebody at the till was rude to me on {day}", "nobody helped me on {day}, I stood there for an hour", "I was treated badly", "the man at your desk shouted at me"),
     ("to complain about {day}", "for the manager because of a rude word on {day}", "why nobody had helped on {day} at {hour}"),
     ("what happened on {day} should not have happened", "the shop manager answers within two working days")),
    (("the woman at the desk was so kind on {day}", "I love my {product}", "thank you for the good help on {day}", "your team is great"),
     ("to thank the team", "to say how good the help was on {day}", "to praise the pharmacist"),
     ("kind words go on to the team", "it is lovely to hear such a thing, and that the team will know it")),
)  # fmt: skip
REPORT_FRAMES = (
    "{words}, wrote {name}. {name2} (explained|answered|wrote back|said) that {outcome}.",
    "{name} (called|came in|wrote|was at the service desk) and said: {words}. {name} (heard|learned|was told) that {outcome}.",
    "{name} asked {matter}, and {name2} (explained|said|answered) that {outcome}.",
    "On {day} {name} (called|came|wrote) to ask {matter}. {name2} (knew|said|told {name}) that {outcome}.",
    "{name2} told {name}, who had said {words}, that {outcome}.",
    "A letter from {name} said {words}. The answer was that {outcome}.",
    "When people ask {matter}, (they hear|we say|the answer is) that {outcome}.",
)  # fmt: skip


def _list_document(slots: dict[str, str], rng: random.Random) -> str:
    """A list of parcels, and then where each of them went, in another order: reading it needs looking back."""
    rows = [
        (order_number(rng), first_name(rng, 0.5), rng.choice(CITIES), rng.choice(EVERYTHING).name)
        for _ in range(rng.choice((2, 3, 4)))
    ]
    lines = [f"Parcels of {slots['day']}, {slots['date']}."]
    lines += [f"{order}: {name}, {city}, {product}." for order, name, city, product in rows]
    rng.shuffle(rows)
    for order, name, city, product in rows:
        phrase = rng.choice((
            "Order {order} went to {name} in {city} with the {product}.",
            "{name} in {city} got the {product} from order {order}.",
            "Parcel {order} for {name} held the {product}.",
        ))  # fmt: skip
        lines.append(phrase.format(order=order, name=name, city=city, product=product))
    return "\n".join(lines) if rng.random() < 0.5 else " ".join(lines)


def _report_document(rng: random.Random) -> str:
    """What some customers came with and what they heard, one after the other."""
    sentences = []
    for words, matters, outcomes in rng.sample(REPORTS, rng.randrange(3, 7)):
        product, remedy = rng.choice(GOODS + DEVICES), rng.choice(REMEDIES)
        slots = common_slots(rng) | product_slots(product) | {"remedy": remedy.name, "remedy_use": remedy.use}
        slots |= {"name": first_name(rng, 0.3), "name2": first_name(rng)}
        slots["words"], slots["matter"] = (fill(rng.choice(side), slots, rng) for side in (words, matters))
        if rng.random() < 0.14:
            slots["words"] = misspell(slots["words"], rng)
        slots["outcome"] = fill(rng.choice(outcomes), slots, rng)
        sentence = fill(rng.choice(REPORT_FRAMES), slots, rng)
        sentences.append(sentence[:1].upper() + sentence[1:])
    return "\n".join(sentences) if rng.random() < 0.5 else " ".join(sentences)


def document(rng: random.Random) -> str:
    """One text of the corpus: an article, a product page, a case note, a story, a notice, a parcel list or reports."""
    kinds = {"article": 14, "product": 11, "case": 18, "story": 8, "notice": 8, "list": 9, "report": 32}
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    if kind == "report":
        return _report_document(rng)
    slots = common_slots(rng) | product_slots(product := rng.choice(EVERYTHING))
    second = rng.choice(EVERYTHING)
    city2, topic = rng.choice(CITIES), rng.choice(list(ARTICLES))
    slots |= {
        "name": first_name(rng, 0.35), "name2": first_name(rng, 0.2), "product2": second.name, "price2": second.price,
        "remedy": rng.choice(REMEDIES).name, "month": rng.choice(MONTHS), "city2": city2, "topic": topic,
        "count": str(rng.randrange(5, 60)), "count2": str(rng.randrange(5, 60)),
    }  # fmt: skip
    if rng.random() < 0.3:
        slots["name"] += " " + rng.choice(LAST_NAMES)
    if kind == "list":
        return _list_document(slots, rng)
    if kind == "article":
        lines = rng.sample(ARTICLES[topic], rng.randrange(3, 1 + min(7, len(ARTICLES[topic]))))
        lines = [f"{glue} {line}" for glue, line in zip(rng.sample(ARTICLE_GLUE, len(lines)), lines, strict=True)]
        head = rng.choice(ARTICLE_HEADS) + "\n"
    elif kind == "product":
        pool = [line for line in PRODUCT_LINES if product not in REMEDIES or not re.search("warranty|last", line)]
        lines = rng.sample(pool, rng.randrange(4, 9))
        head = rng.choice(("", "{product}\n", "{product}, {price} euros\n", "From aisle {aisle}: "))
    elif kind == "case":
        lines = rng.sample(CASE_LINES, rng.randrange(5, 11))
        head = rng.choice(
            (
                "",
                "Case note, order {order}, {name}\n",
                "On {date}, {name} wrote to us about order {order}. ",
                "Report by {name2}: ",
            )
        )
    else:
        pool = STORY_LINES if kind == "story" else NOTICE_LINES
        lines = rng.sample(pool, rng.randrange(4, 9))
        lines[rng.randrange(len(lines))] = rng.choice(CASE_LINES if rng.random() < 0.5 else PRODUCT_LINES)
        head = ""
    sentences = [fill(line, slots, rng) for line in lines]
    text = fill(head, slots, rng)
    text = text + ("\n" if head.endswith("\n") else " " if text else "") + " ".join(sentences)
    return text[:1].upper() + text[1:]


def corpus(characters: int = CORPUS_CHARACTERS, seed: int = DEFAULT_SEED) -> Iterator[str]:
    """Documents until they hold so many characters. A longer corpus begins with the shorter one."""
    rng = random.Random(f"corpus {seed}")
    written = 0
    while written < characters:
        text = document(rng)
        written += len(text) + 2
        yield text


def build(seed: int) -> dict[str, str]:
    """The contents of all files, by file name."""
    files = {
        f"{split}.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for split, rows in conversations(seed).items()
    }
    files["corpus.txt"] = "\n\n".join(corpus(seed=seed)) + "\n"
    return files


def main(arguments: list[str] | None = None) -> int:
    """Write or check the files; the exit code is 1 where a check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).resolve().parent / "data")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--check", action="store_true", help="write nothing, compare with the files that are there")
    options = parser.parse_args(arguments)
    files = build(options.seed)
    if options.check:
        different = [
            name for name, text in files.items()
            if not (options.output_dir / name).is_file() or (options.output_dir / name).read_bytes() != text.encode()
        ]  # fmt: skip
        print("differs: " + ", ".join(different) if different else "all files are as the seed gives them")
        return 1 if different else 0
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (options.output_dir / name).write_bytes(text.encode())
        print(f"{options.output_dir / name}: {len(text.encode()):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
