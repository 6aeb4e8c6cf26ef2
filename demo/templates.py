"""The word problems of the demo: templates in GSM8K's format, and the code that fills them in.

A template is text. `{apples}` is a number, a name, a pronoun or a word; `[left = apples - eaten]` in a
step is a calculation, written out as `12-5=<<12-5=7>>7` and usable in the steps after it (with a dollar
sign, `[$left = ...]`, it is `12-5=$<<12-5=7>>7`). Numbers are drawn until every result is a whole number
from 2 to 300: a model of well under a million weights can learn to count that far.
"""

import re
from dataclasses import dataclass, field

LARGEST = 300

HE = {"he": "he", "his": "his", "him": "him", "He": "He", "His": "His"}
SHE = {"he": "she", "his": "her", "him": "her", "He": "She", "His": "Her"}
MEN = "Ben David Eli Finn Hugo Jack Leo Marco Omar Peter Sam Tom"
WOMEN = "Amy Bella Clara Dina Emma Grace Hana Julia Kate Lucy Nina Rosa"
PRONOUNS = {name: HE for name in MEN.split()} | {name: SHE for name in WOMEN.split()}

SMALL_THINGS = ("marble", "sticker", "button", "shell", "stamp", "coin", "bead", "toy car")
FRUITS = ("apple", "orange", "pear", "plum", "lemon", "mango")
SNACKS = ("cookie", "muffin", "cupcake", "candy bar", "donut")
SUPPLIES = ("notebook", "pencil", "eraser", "marker", "folder")
FLOWERS = ("rose", "tulip", "daisy plant", "sunflower", "lily bulb")


@dataclass(frozen=True)
class Template:
    """`numbers` maps a variable to its range; `words` maps a word slot to its choices."""

    name: str
    numbers: dict
    questions: tuple
    steps: tuple
    words: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """A filled-in template. `numbers` are the drawn ones, in the template's order."""

    template: str
    numbers: tuple
    question: str
    answer: str


CALCULATION = re.compile(r"\[(\$?)(\w+) = ([^\]]+)\]")


def draw_problem(template, rng):
    """One problem of a template; draws again until `solve` accepts the numbers."""
    while True:
        numbers = {variable: rng.choice(choices) for variable, choices in template.numbers.items()}
        solution = solve(template, numbers)
        if solution:
            break
    first, second, third = rng.sample(sorted(PRONOUNS), 3)
    words = {slot: rng.choice(choices) for slot, choices in template.words.items()}
    words |= {"A": first, "B": second, "C": third} | PRONOUNS[first]
    question = rng.choice(template.questions).format_map(numbers | words)
    answer = "\n".join(solution).format_map(numbers | words)
    return Problem(template.name, tuple(numbers.values()), question, answer)


def solve(template, numbers):
    """The solution's lines with the calculations written out, or None where a result is out of bounds."""
    values, lines = dict(numbers), []
    for step in template.steps:
        dollar, result, expression = CALCULATION.search(step).groups()
        value = eval(expression, {"__builtins__": {}}, values)  # the expressions are those of this file
        if value != int(value) or not 2 <= value <= LARGEST:
            return None
        values[result] = int(value)
        written = re.sub(r"[a-z_]\w*", lambda name: str(values[name.group()]), expression).replace(" ", "")
        lines.append(CALCULATION.sub(f"{written}={dollar}<<{written}={int(value)}>>{int(value)}", step))
    return [*lines, f"#### {int(value)}"]


TEMPLATES = (
    # ---------------------------------------------------------------- one step
    Template(
        "gift",
        {"had": range(5, 150), "more": range(5, 100)},
        (
            "{A} has {had} {item}s. {B} gives {him} {more} more. How many {item}s does {A} have now?",
            ("{B} gives {A} {more} {item}s. {A} already had {had} {item}s. How many {item}s does {A} have in all?"),
            (
                "There are {had} {item}s in {A}'s collection. If {he} gets {more} more {item}s for {his} "
                "birthday, how many {item}s will {he} have?"
            ),
        ),
        ("{A} has [total = had + more] {item}s.",),
        {"item": SMALL_THINGS},
    ),
    Template(
        "sold",
        {"baked": range(20, 250), "sold": range(5, 150)},
        (
            "{A} baked {baked} {item}s and sold {sold} of them. How many {item}s does {he} have left?",
            (
                "A bakery had {baked} {item}s this morning. It has sold {sold} {item}s since then. How many "
                "{item}s are left?"
            ),
            "{A} sold {sold} of the {baked} {item}s that {he} made. How many {item}s were not sold?",
        ),
        ("There are [left = baked - sold] {item}s left.",),
        {"item": SNACKS},
    ),
    Template(
        "boxes",
        {"boxes": range(2, 13), "each": range(3, 26)},
        (
            "There are {boxes} boxes with {each} {item}s in each box. How many {item}s are there?",
            ("{A} packs {each} {item}s into every box. {He} fills {boxes} boxes. How many {item}s does {he} pack?"),
            "A box holds {each} {item}s. How many {item}s do {boxes} boxes hold?",
        ),
        ("The boxes hold [total = boxes * each] {item}s.",),
        {"item": SUPPLIES + FRUITS},
    ),
    Template(
        "share",
        {"total": range(6, 241), "friends": range(2, 13)},
        (
            ("{A} shares {total} {item}s equally among {friends} friends. How many {item}s does each friend get?"),
            "{friends} friends split {total} {item}s evenly. How many {item}s does each of them get?",
            (
                "{A} puts {total} {item}s into {friends} bags so that all the bags hold the same number. How "
                "many {item}s are in each bag?"
            ),
        ),
        ("Each gets [each = total / friends] {item}s.",),
        {"item": SMALL_THINGS + FRUITS},
    ),
    Template(
        "compare",
        {"more": range(20, 200), "fewer": range(10, 150)},
        (
            ("{A} read {more} pages this week and {B} read {fewer} pages. How many more pages did {A} read than {B}?"),
            ("{B} walked {fewer} blocks in a month. {A} walked {more} blocks. How many fewer blocks did {B} walk?"),
            ("{A} scored {more} points in a game and {B} scored {fewer} points. By how many points did {A} win?"),
        ),
        ("The difference is [difference = more - fewer].",),
    ),
    Template(
        "travel",
        {"speed": range(6, 66), "hours": range(2, 13)},
        (
            "A {vehicle} travels at {speed} miles per hour for {hours} hours. How many miles does it travel?",
            (
                "{A} takes a {vehicle} that goes {speed} miles every hour. How far does it go in {hours} "
                "hours, in miles?"
            ),
            "How many miles does a {vehicle} cover in {hours} hours at a speed of {speed} miles per hour?",
        ),
        ("The {vehicle} goes [miles = hours * speed] miles.",),
        {"vehicle": ("train", "bus", "truck", "boat", "tram")},
    ),
    Template(
        "half_club",
        {"students": range(10, 300)},
        (
            "There are {students} students at a school. Half of them {hobby}. How many students {hobby}?",
            "Half of the {students} students in {A}'s school {hobby}. How many students is that?",
            (
                "{A} asked {students} students what they do after school. Half of them said that they "
                "{hobby}. How many students {hobby}?"
            ),
        ),
        ("That is [half = students / 2] students.",),
        {"hobby": ("play chess", "sing in a choir", "ride a bike", "swim", "paint", "play football")},
    ),
    Template(
        "older",
        {"age": range(4, 60), "years": range(3, 50)},
        (
            "{A} is {age} years old. {B} is {years} years older than {A}. How old is {B}?",
            "{B} is {years} years older than {A}, who is {age}. What is {B}'s age?",
            "{A} is {age} now. How old will {he} be in {years} years?",
        ),
        ("The age is [older = age + years] years.",),
    ),
    Template(
        "change",
        {"price": range(5, 195), "paid": (10, 20, 30, 40, 50, 60, 80, 100, 150, 200)},
        (
            "{A} buys a {item} for ${price} and pays with ${paid}. How many dollars does {he} get back?",
            "A {item} costs ${price}. {A} hands over ${paid}. How much change does {he} get, in dollars?",
            "{A} has ${paid}. How many dollars will {he} have after buying a {item} that costs ${price}?",
        ),
        ("{A} has [$left = paid - price] left.",),
        {"item": ("hat", "lamp", "jacket", "watch", "chair", "kite", "backpack")},
    ),
    # --------------------------------------------------------------- two steps
    Template(
        "packs_given",
        {"packs": range(2, 13), "each": range(3, 26), "given": range(3, 80)},
        (
            (
                "{A} buys {packs} packs of {item}s with {each} {item}s in each pack. {He} gives {given} "
                "{item}s to {B}. How many {item}s does {A} have left?"
            ),
            (
                "Each pack holds {each} {item}s. {A} opens {packs} packs and hands out {given} {item}s at "
                "school. How many {item}s are left?"
            ),
            (
                "{A} gave away {given} {item}s from the {packs} packs that {he} bought. If there were {each} "
                "{item}s in every pack, how many {item}s does {he} still have?"
            ),
        ),
        ("{A} bought [bought = packs * each] {item}s.", "There are [left = bought - given] {item}s left."),
        {"item": ("sticker", "pencil", "marker", "balloon", "card")},
    ),
    Template(
        "buy_change",
        {"count": range(2, 13), "price": range(2, 20), "paid": (20, 30, 40, 50, 60, 80, 100, 150, 200)},
        (
            (
                "{A} buys {count} {item}s at ${price} each and pays with ${paid}. How much change does {he} "
                "get, in dollars?"
            ),
            (
                "A {item} costs ${price}. {A} has ${paid} and buys {count} {item}s. How many dollars does "
                "{he} have left?"
            ),
            (
                "{A} went to the store with ${paid} and came home with {count} {item}s. If each one cost "
                "${price}, how many dollars did {he} bring back?"
            ),
        ),
        ("The {item}s cost [$cost = count * price].", "{A} has [$left = paid - cost] left."),
        {"item": SUPPLIES + ("book", "ticket", "plate", "shirt")},
    ),
    Template(
        "twice_total",
        {"first": range(5, 99)},
        (
            ("{A} picked {first} {item}s and {B} picked twice as many. How many {item}s did they pick altogether?"),
            (
                "{B} collected twice as many {item}s as {A}, who collected {first}. How many {item}s do they "
                "have together?"
            ),
            (
                "On Monday {A} counted {first} {item}s. On Tuesday {he} counted double that number. How many "
                "{item}s did {he} count on both days?"
            ),
        ),
        ("The double is [second = 2 * first] {item}s.", "Together that is [total = first + second] {item}s."),
        {"item": FRUITS + ("shell", "acorn", "mushroom")},
    ),
    Template(
        "half_total",
        {"first": range(6, 200)},
        (
            (
                "{A} sold {first} {item}s in April and half as many in May. How many {item}s did {he} sell "
                "in both months?"
            ),
            (
                "In the morning {A} sold {first} {item}s. In the afternoon {he} sold half as many. How many "
                "{item}s did {he} sell that day?"
            ),
            (
                "{B} sold half as many {item}s as {A}. If {A} sold {first}, how many {item}s did the two "
                "sell altogether?"
            ),
        ),
        ("The half is [second = first / 2] {item}s.", "Altogether that is [total = first + second] {item}s."),
        {"item": ("ticket", "clip", "card", "poster", "cupcake")},
    ),
    Template(
        "seats",
        {"rows": range(3, 13), "seats": range(5, 24), "extra": range(3, 40)},
        (
            (
                "A {hall} has {rows} rows of {seats} seats and {extra} extra chairs along the wall. How many "
                "people can sit down?"
            ),
            (
                "There are {extra} folding chairs at the back of a {hall}. In front of them are {rows} rows "
                "with {seats} seats each. How many seats are there in all?"
            ),
            (
                "{A} sets up {rows} rows of {seats} chairs in a {hall}. Later {he} adds {extra} more chairs. "
                "How many chairs are there now?"
            ),
        ),
        (
            "The rows have [rowed = rows * seats] seats.",
            "With the others there are [total = rowed + extra] seats.",
        ),
        {"hall": ("theater", "school hall", "church", "tent", "cinema")},
    ),
    Template(
        "daily_saving",
        {"earned": range(12, 70), "spent": range(4, 50), "days": range(3, 13)},
        (
            ("{A} earns ${earned} a day and spends ${spent} a day. How many dollars does {he} save in {days} days?"),
            (
                "Every day {A} makes ${earned} as a {job} and spends ${spent} on food. How much money will "
                "{he} have saved after {days} days?"
            ),
            (
                "{A} works as a {job} for {days} days. Each day {he} is paid ${earned} and pays ${spent} for "
                "the trip. How many dollars does {he} keep?"
            ),
        ),
        ("Each day {A} keeps [$kept = earned - spent].", "In all {he} keeps [$saved = days * kept]."),
        {"job": ("baker", "driver", "painter", "waiter", "gardener")},
    ),
    Template(
        "bus",
        {"start": range(10, 90), "off": range(3, 60), "on": range(3, 60)},
        (
            (
                "A {vehicle} leaves with {start} people. At the first stop {off} people get off and {on} get "
                "on. How many people are on the {vehicle} now?"
            ),
            (
                "There are {start} passengers on a {vehicle}. {off} of them leave at the next station, where "
                "{on} others come in. How many passengers are there now?"
            ),
            (
                "{on} people get on a {vehicle} at a stop, right after {off} people got off. If {start} "
                "people were on it before, how many are on it after the stop?"
            ),
        ),
        (
            "After people leave there are [stayed = start - off].",
            "Then there are [now = stayed + on] people.",
        ),
        {"vehicle": ("bus", "train", "tram", "ferry")},
    ),
    Template(
        "eaten_shared",
        {"total": range(15, 200), "eaten": range(2, 40), "children": range(2, 11)},
        (
            (
                "{A} has {total} {item}s. {He} eats {eaten} of them and shares the rest equally among "
                "{children} children. How many {item}s does each child get?"
            ),
            (
                "Out of {total} {item}s, {eaten} were eaten at lunch. The rest were divided evenly between "
                "{children} children. How many {item}s did each child get?"
            ),
            (
                "{children} children share a plate of {total} {item}s after {A} has taken {eaten} for {his} "
                "family. If they share equally, how many {item}s does each child get?"
            ),
        ),
        (
            "There are [rest = total - eaten] {item}s to share.",
            "Each child gets [each = rest / children] {item}s.",
        ),
        {"item": FRUITS + SNACKS},
    ),
    Template(
        "discount",
        {"price": range(10, 261, 2), "percent": (10, 20, 25, 50, 75)},
        (
            "A {item} costs ${price}. Today it is {percent}% off. How many dollars does it cost today?",
            (
                "{A} buys a {item} at a discount of {percent}%. Its usual price is ${price}. How much does "
                "{he} pay, in dollars?"
            ),
            (
                "The shop takes {percent}% off the price of every {item}. What is the new price, in dollars, "
                "of a {item} that used to cost ${price}?"
            ),
        ),
        ("The discount is [$discount = price * percent / 100].", "The price is [$pays = price - discount]."),
        {"item": ("bike", "coat", "radio", "phone", "desk", "guitar", "tent")},
    ),
    Template(
        "times_as_old",
        {"age": range(3, 16), "times": range(2, 7), "years": range(2, 30)},
        (
            ("{A} is {age} years old. {B} is {times} times as old as {A}. How old will {B} be in {years} years?"),
            (
                "{B}'s age is {times} times {A}'s age. {A} is {age} years old. What will {B}'s age be "
                "{years} years from now?"
            ),
            "How old will {B} be in {years} years if {A} is {age} now and {B} is {times} times as old?",
        ),
        ("{B} is now [now = times * age] years old.", "Then {B} will be [later = now + years] years old."),
    ),
    Template(
        "ribbon",
        {"pieces": range(3, 13), "length": range(3, 22), "left": range(2, 40)},
        (
            (
                "{A} cuts {pieces} pieces of {length} inches each from a {item} and has {left} inches left. "
                "How many inches long was the {item}?"
            ),
            (
                "After {A} cut a {item} into {pieces} pieces of {length} inches, {left} inches were left "
                "over. How long was the {item} at first, in inches?"
            ),
            (
                "A {item} has {left} inches left after {pieces} pieces of {length} inches each were cut off. "
                "How many inches long was it before?"
            ),
        ),
        (
            "The pieces are [cut = pieces * length] inches.",
            "The {item} was [whole = cut + left] inches long.",
        ),
        {"item": ("ribbon", "rope", "string", "wire", "board")},
    ),
    Template(
        "round_trip",
        {"miles": range(2, 26), "days": range(2, 13)},
        (
            (
                "{A} lives {miles} miles from {place}. {He} goes there and back every day. How many miles "
                "does {he} travel in {days} days?"
            ),
            (
                "Every day {A} drives {miles} miles to {place} and the same way home. How many miles does "
                "{he} drive in {days} days?"
            ),
            (
                "It is {miles} miles from {A}'s house to {place}. {He} made the round trip on {days} days. "
                "How many miles is that in all?"
            ),
        ),
        ("Each day is [trip = 2 * miles] miles.", "In all that is [total = days * trip] miles."),
        {"place": ("school", "work", "the gym", "the lake", "the market")},
    ),
    Template(
        "hours_minutes",
        {"hours": range(2, 5), "minutes": range(2, 60)},
        (
            "A {show} lasts {hours} hours and {minutes} minutes. How many minutes is that?",
            ("{A} spent {hours} hours and {minutes} minutes at a {show}. How many minutes did {he} spend there?"),
            "How many minutes long is a {show} that takes {hours} hours and {minutes} minutes?",
        ),
        ("The hours are [full = hours * 60] minutes.", "In all that is [total = full + minutes] minutes."),
        {"show": ("film", "concert", "match", "play", "parade")},
    ),
    Template(
        "goal_weeks",
        {"goal": range(40, 300), "has": range(5, 100), "week": range(3, 26)},
        (
            (
                "{A} wants a {item} that costs ${goal}. {He} has ${has} and saves ${week} a week. How many "
                "weeks will it take {him} to get the {item}?"
            ),
            (
                "{A} saves ${week} every week for a {item}. It costs ${goal} and {he} already has ${has}. "
                "For how many weeks must {he} save?"
            ),
            (
                "A {item} costs ${goal}. How many weeks does {A} need to save for it if {he} starts with "
                "${has} and puts away ${week} each week?"
            ),
        ),
        ("{A} still needs [$need = goal - has].", "That takes [weeks = need / week] weeks."),
        {"item": ("bike", "camera", "guitar", "phone", "skateboard")},
    ),
    # ------------------------------------------------------------- three steps
    Template(
        "two_kinds",
        {"many": range(2, 11), "price": range(2, 15), "others": range(2, 11), "other_price": range(2, 15)},
        (
            (
                "{A} buys {many} {item}s at ${price} each and {others} {other}s at ${other_price} each. How "
                "many dollars does {he} spend?"
            ),
            (
                "A {item} costs ${price} and a {other} costs ${other_price}. How much do {many} {item}s and "
                "{others} {other}s cost together, in dollars?"
            ),
            (
                "At the market {A} paid ${price} for each of {many} {item}s. Then {he} got {others} {other}s "
                "for ${other_price} apiece. How many dollars did {he} spend in all?"
            ),
        ),
        (
            "The {item}s cost [$first = many * price].",
            "The {other}s cost [$second = others * other_price].",
            "Together they cost [$total = first + second].",
        ),
        {"item": ("shirt", "book", "pizza", "plant"), "other": ("hat", "toy", "salad", "mug")},
    ),
    Template(
        "wages",
        {"first": range(2, 9), "second": range(2, 9), "rate": range(6, 22), "spent": range(5, 80)},
        (
            (
                "{A} works {first} hours on Saturday and {second} hours on Sunday for ${rate} an hour. Then "
                "{he} spends ${spent} on {thing}. How many dollars are left?"
            ),
            (
                "{A} gets ${rate} for every hour of work. {He} worked {first} hours on Monday and {second} "
                "hours on Tuesday and paid ${spent} for {thing}. How many dollars does {he} have left?"
            ),
            (
                "After working {first} hours one day and {second} hours the next, {A} bought {thing} for "
                "${spent}. {He} earns ${rate} per hour. How much of the money remains, in dollars?"
            ),
        ),
        (
            "{A} works [hours = first + second] hours.",
            "{He} earns [$earned = hours * rate].",
            "{He} has [$left = earned - spent] left.",
        ),
        {"thing": ("food", "shoes", "gifts", "a lamp", "train tickets")},
    ),
    Template(
        "garden",
        {"rows": range(3, 13), "plants": range(4, 22), "lost": range(3, 50), "new": range(3, 50)},
        (
            (
                "{A} plants {rows} rows of {plants} {item}s. Rabbits eat {lost} of them, so {he} plants "
                "{new} more. How many {item}s are in the garden now?"
            ),
            (
                "A garden has {rows} rows with {plants} {item}s in each row. {lost} {item}s die in a storm "
                "and {A} buys {new} new ones. How many {item}s are there in the end?"
            ),
            (
                "There were {plants} {item}s in each of the {rows} rows of a field. {A} pulled out {lost} "
                "and later put in {new} others. How many {item}s does the field have now?"
            ),
        ),
        (
            "At first there were [first = rows * plants] {item}s.",
            "After the loss there were [kept = first - lost] {item}s.",
            "Now there are [now = kept + new] {item}s.",
        ),
        {"item": FLOWERS + ("cabbage", "carrot", "bean plant")},
    ),
    Template(
        "half_sold_bags",
        {"trays": range(2, 13), "each": range(4, 25), "bags": range(2, 11)},
        (
            (
                "{A} bakes {trays} trays of {each} {item}s. {He} sells half of them and puts the rest into "
                "{bags} bags, the same number in each. How many {item}s are in each bag?"
            ),
            (
                "There are {each} {item}s on each of {trays} trays. Half of all the {item}s are sold, and "
                "the others are packed evenly in {bags} bags. How many {item}s does each bag hold?"
            ),
            (
                "{bags} bags are filled equally with what {A} could not sell. {He} baked {trays} trays with "
                "{each} {item}s each and sold half of the {item}s. How many {item}s go into each bag?"
            ),
        ),
        (
            "{A} has [baked = trays * each] {item}s.",
            "Half of them is [rest = baked / 2] {item}s.",
            "Each bag gets [bagged = rest / bags] {item}s.",
        ),
        {"item": SNACKS + ("bread roll", "scone")},
    ),
    Template(
        "two_speeds",
        {"slow": range(3, 26), "slow_hours": range(2, 9), "fast": range(5, 40), "fast_hours": range(2, 7)},
        (
            (
                "{A} rides at {slow} miles per hour for {slow_hours} hours and then at {fast} miles per hour "
                "for {fast_hours} hours. How many miles does {he} ride?"
            ),
            (
                "On a trip {A} went {slow} miles an hour for the first {slow_hours} hours and {fast} miles "
                "an hour for the last {fast_hours} hours. How long was the trip, in miles?"
            ),
            (
                "For {slow_hours} hours a {vehicle} moves at {slow} miles per hour. Then it moves at {fast} "
                "miles per hour for {fast_hours} hours more. How many miles does it go in all?"
            ),
        ),
        (
            "The first part is [first = slow_hours * slow] miles.",
            "The second part is [second = fast_hours * fast] miles.",
            "The whole way is [total = first + second] miles.",
        ),
        {"vehicle": ("boat", "truck", "bus", "tram")},
    ),
    Template(
        "recipe",
        {"serves": range(2, 7), "cups": range(2, 10), "people": range(8, 61), "has": range(2, 30)},
        (
            (
                "A recipe for {serves} people needs {cups} cups of {food}. {A} cooks for {people} people and "
                "already has {has} cups of {food}. How many more cups does {he} need?"
            ),
            (
                "{A} needs {cups} cups of {food} to feed {serves} people. {He} has {has} cups at home. How "
                "many cups of {food} must {he} buy to feed {people} people?"
            ),
            (
                "{people} people are coming to dinner. {A}'s recipe uses {cups} cups of {food} for every "
                "{serves} people, and {he} has {has} cups of {food}. How many cups are missing?"
            ),
        ),
        (
            "{A} makes the recipe [times = people / serves] times.",
            "That takes [needed = times * cups] cups of {food}.",
            "{He} needs [missing = needed - has] more cups.",
        ),
        {"food": ("rice", "flour", "milk", "soup", "pasta")},
    ),
    Template(
        "cartons",
        {"hens": range(2, 13), "eggs": range(2, 8), "days": range(2, 8), "carton": (4, 6, 8, 10, 12)},
        (
            (
                "{A} has {hens} hens that each lay {eggs} eggs a day. {He} packs the eggs of {days} days "
                "into cartons of {carton}. How many cartons does {he} fill?"
            ),
            (
                "Each of {A}'s {hens} {bird} lays {eggs} eggs every day. How many cartons of {carton} eggs "
                "can {he} fill after {days} days?"
            ),
            (
                "A carton holds {carton} eggs. {A} keeps {hens} {bird}, and each of them lays {eggs} eggs "
                "per day. How many cartons are filled in {days} days?"
            ),
        ),
        (
            "They lay [day = hens * eggs] eggs a day.",
            "In all they lay [total = days * day] eggs.",
            "That fills [cartons = total / carton] cartons.",
        ),
        {"bird": ("hens", "ducks", "geese")},
    ),
    Template(
        "tank",
        {"start": range(10, 100), "inflow": range(8, 35), "leak": range(2, 20), "minutes": range(3, 13)},
        (
            (
                "A {tank} holds {start} liters of water. Every minute {inflow} liters flow in and {leak} "
                "liters leak out. How many liters are in it after {minutes} minutes?"
            ),
            (
                "{A} fills a {tank} at {inflow} liters per minute, but it loses {leak} liters per minute. If "
                "it has {start} liters at the start, how many liters does it have {minutes} minutes later?"
            ),
            (
                "There are {start} liters in a {tank}. It gains {inflow} liters and loses {leak} liters each "
                "minute. How much water is in it after {minutes} minutes, in liters?"
            ),
        ),
        (
            "The {tank} gains [gain = inflow - leak] liters a minute.",
            "It gains [gained = minutes * gain] liters in all.",
            "Now it holds [now = gained + start] liters.",
        ),
        {"tank": ("tank", "pool", "barrel", "pond")},
    ),
    Template(
        "percent_group",
        {"total": range(20, 301, 10), "percent": (10, 20, 25, 50, 75), "teams": range(2, 11)},
        (
            (
                "There are {total} children at a camp. {percent}% of them go {sport}, and the others form "
                "{teams} equal teams. How many children are in each team?"
            ),
            (
                "{percent}% of the {total} children in a club go {sport}. The rest are split evenly into "
                "{teams} groups. How many children does each group have?"
            ),
            (
                "A camp splits everyone who does not go {sport} into {teams} teams of the same size. If "
                "{percent}% of the {total} children go {sport}, how many are in each team?"
            ),
        ),
        (
            "The children who go are [gone = total * percent / 100].",
            "The others are [others = total - gone] children.",
            "Each team has [team = others / teams] children.",
        ),
        {"sport": ("hiking", "swimming", "fishing", "sailing")},
    ),
    Template(
        "fence",
        {"length": range(3, 25), "width": range(2, 16), "price": range(2, 9)},
        (
            (
                "{A} builds a fence around a {plot} that is {length} feet long and {width} feet wide. One "
                "foot of fence costs ${price}. How many dollars does the fence cost?"
            ),
            (
                "A {plot} is {width} feet wide and {length} feet long. At ${price} a foot, how much does it "
                "cost to put a fence around it, in dollars?"
            ),
            (
                "At ${price} per foot, what does {A} pay, in dollars, to fence a {plot} with a length of "
                "{length} feet and a width of {width} feet?"
            ),
        ),
        (
            "Length and width are [sides = length + width] feet.",
            "All around it is [around = 2 * sides] feet.",
            "The fence costs [$cost = price * around].",
        ),
        {"plot": ("garden", "yard", "field", "playground")},
    ),
    Template(
        "membership",
        {"months": range(2, 13), "fee": range(5, 22), "entry": range(5, 60), "coupon": range(3, 40)},
        (
            (
                "A {club} costs ${fee} a month and ${entry} to join. {A} joins for {months} months with a "
                "coupon of ${coupon}. How many dollars does {he} pay in all?"
            ),
            (
                "{A} joins a {club} for {months} months. {He} pays ${entry} once and ${fee} each month, less "
                "a coupon worth ${coupon}. How much is that in dollars?"
            ),
            (
                "With a coupon for ${coupon}, how many dollars does {A} pay for {months} months at a {club} "
                "that asks ${fee} per month and ${entry} at the start?"
            ),
        ),
        (
            "The months cost [$monthly = months * fee].",
            "With the entry that is [$full = monthly + entry].",
            "After the coupon it is [$pays = full - coupon].",
        ),
        {"club": ("gym", "chess club", "dance school", "swim club")},
    ),
    # -------------------------------------------------------------- four steps
    Template(
        "stand",
        {"first": range(3, 26), "second": range(3, 26), "price": range(2, 9), "cost": range(5, 60)},
        (
            (
                "{A} sells {drink} for ${price} a cup. {He} sells {first} cups on Saturday and {second} cups "
                "on Sunday, and spends ${cost} on supplies. What is {his} profit in dollars?"
            ),
            (
                "{A} spent ${cost} to make {drink}. {He} sold {first} cups in the morning and {second} cups "
                "in the afternoon at ${price} per cup. How many dollars of profit did {he} make?"
            ),
            (
                "A cup of {drink} costs ${price} at {A}'s stand. One day {he} sold {first} cups, the next "
                "day {second}. If {his} supplies cost ${cost}, how much did {he} gain, in dollars?"
            ),
        ),
        (
            "The first sales bring [$early = price * first].",
            "The second sales bring [$late = price * second].",
            "Together that is [$sales = early + late].",
            "The profit is [$profit = sales - cost].",
        ),
        {"drink": ("lemonade", "tea", "juice", "cocoa")},
    ),
    Template(
        "library",
        {
            "shelves": range(3, 13),
            "books": range(6, 25),
            "old": range(5, 90),
            "new": range(3, 60),
            "rooms": range(2, 7),
        },
        (
            (
                "A {place} has {shelves} shelves with {books} books each. It gives away {old} old books and "
                "buys {new} new ones. Then all the books are split evenly between {rooms} rooms. How many "
                "books go in each room?"
            ),
            (
                "{A} looks after {shelves} shelves of {books} books in a {place}. {He} throws out {old} torn "
                "books and gets {new} new ones. {He} then moves the books into {rooms} rooms, the same "
                "number in each. How many books are in each room?"
            ),
        ),
        (
            "The shelves hold [full = shelves * books] books.",
            "Without the old ones there are [kept = full - old] books.",
            "With the new ones there are [now = kept + new] books.",
            "Each room gets [room = now / rooms] books.",
        ),
        {"place": ("library", "school", "town hall", "museum")},
    ),
    Template(
        "pizza",
        {
            "kids": range(2, 25),
            "kid_slices": range(2, 6),
            "adults": range(2, 25),
            "adult_slices": range(2, 8),
            "cut": (6, 8, 10, 12),
        },
        (
            (
                "At a party {kids} children eat {kid_slices} slices of {food} each and {adults} adults eat "
                "{adult_slices} slices each. One {food} has {cut} slices. How many whole {food}s are eaten?"
            ),
            (
                "{A} orders {food}s with {cut} slices each. {His} {kids} young guests want {kid_slices} "
                "slices each and the {adults} adults want {adult_slices} slices each. How many {food}s does "
                "{he} need?"
            ),
            (
                "A {food} is cut into {cut} slices. How many {food}s feed {adults} adults who eat "
                "{adult_slices} slices each and {kids} children who eat {kid_slices} slices each?"
            ),
        ),
        (
            "The children eat [young = kids * kid_slices] slices.",
            "The adults eat [grown = adults * adult_slices] slices.",
            "Together they eat [slices = young + grown] slices.",
            "That is [whole = slices / cut] {food}s.",
        ),
        {"food": ("pizza", "cake", "pie")},
    ),
    Template(
        "chores",
        {
            "lawns": range(2, 11),
            "lawn": range(4, 16),
            "cars": range(2, 11),
            "car": range(3, 13),
            "goal": range(50, 300),
        },
        (
            (
                "{A} wants to buy a {item} for ${goal}. {He} mows {lawns} lawns for ${lawn} each and washes "
                "{cars} cars for ${car} each. How many more dollars does {he} need?"
            ),
            (
                "For mowing a lawn {A} gets ${lawn}, and for washing a car ${car}. {He} mows {lawns} lawns "
                "and washes {cars} cars. How many dollars is {he} short of the ${goal} for a {item}?"
            ),
            (
                "A {item} costs ${goal}. {A} has washed {cars} cars at ${car} each and mowed {lawns} lawns "
                "at ${lawn} each. How much money does {he} still need, in dollars?"
            ),
        ),
        (
            "The lawns bring [$mowed = lawns * lawn].",
            "The cars bring [$washed = cars * car].",
            "{A} has [$has = mowed + washed].",
            "{He} still needs [$need = goal - has].",
        ),
        {"item": ("bike", "camera", "tablet", "drum set")},
    ),
    Template(
        "three_friends",
        {"first": range(3, 60), "more": range(2, 40), "times": range(2, 5)},
        (
            (
                "{A} has {first} {item}s. {B} has {more} more than {A}, and {C} has {times} times as many as "
                "{B}. How many {item}s do the three have altogether?"
            ),
            (
                "{C} has {times} times as many {item}s as {B}. {B} has {more} {item}s more than {A}, who has "
                "{first}. How many {item}s do they have in all?"
            ),
            (
                "{B} found {more} more {item}s than {A}. {C} found {times} times as many {item}s as {B}. If "
                "{A} found {first} {item}s, how many did all three find?"
            ),
        ),
        (
            "{B} has [second = first + more] {item}s.",
            "{C} has [third = times * second] {item}s.",
            "{A} and {B} have [two = first + second] {item}s.",
            "All three have [total = two + third] {item}s.",
        ),
        {"item": SMALL_THINGS},
    ),
    Template(
        "legs",
        {"birds": range(3, 40), "beasts": range(3, 30), "gone": range(2, 12)},
        (
            (
                "A farm has {birds} {bird} with 2 legs each and {beasts} {beast} with 4 legs each. Then "
                "{gone} of the {beast} are sold. How many legs are left on the farm?"
            ),
            (
                "{A} sells {gone} of {his} {beasts} {beast}. {He} also keeps {birds} {bird}. With 2 legs for "
                "each of the {bird} and 4 for each of the {beast}, how many legs do the animals have now?"
            ),
        ),
        (
            "There are [left = beasts - gone] {beast} left.",
            "The {beast} have [four = 4 * left] legs.",
            "The {bird} have [two = 2 * birds] legs.",
            "In all there are [legs = four + two] legs.",
        ),
        {"bird": ("hens", "ducks", "geese"), "beast": ("cows", "goats", "sheep", "pigs")},
    ),
    # -------------------------------------------------------------- five steps
    Template(
        "trip_buses",
        {
            "classes": range(2, 11),
            "students": range(8, 25),
            "adults": range(2, 40),
            "seats": range(10, 51),
            "price": range(5, 61),
        },
        (
            (
                "{classes} classes of {students} students and {adults} adults go to a {place} in full buses "
                "of {seats} seats. A bus costs ${price}, and the school pays half of the cost. How many "
                "dollars does the school pay?"
            ),
            (
                "A school rents buses with {seats} seats for ${price} each. {adults} adults and {classes} "
                "classes with {students} students each fill them for a trip to a {place}. The school pays "
                "half of the cost. How much is that in dollars?"
            ),
        ),
        (
            "There are [young = classes * students] students.",
            "There are [people = young + adults] people.",
            "They fill [buses = people / seats] buses.",
            "The buses cost [$cost = buses * price].",
            "The school pays [$half = cost / 2].",
        ),
        {"place": ("museum", "zoo", "farm", "park")},
    ),
    Template(
        "book_days",
        {"first": range(4, 40), "fewer": range(2, 30), "pages": range(60, 301)},
        (
            (
                "{A} has a {item} of {pages} pages. {He} reads {first} pages on Monday, twice as many on "
                "Tuesday and {fewer} fewer than on Tuesday on Wednesday. How many pages are left?"
            ),
            (
                "On Monday {A} read {first} pages of a {item}, on Tuesday double that, and on Wednesday "
                "{fewer} pages fewer than on Tuesday. The {item} has {pages} pages. How many pages does {he} "
                "still have to read?"
            ),
        ),
        (
            "On Tuesday {A} read [second = 2 * first] pages.",
            "On Wednesday {he} read [third = second - fewer] pages.",
            "In two days {he} read [two = first + second] pages.",
            "In three days {he} read [three = two + third] pages.",
            "There are [left = pages - three] pages left.",
        ),
        {"item": ("book", "novel", "comic", "story")},
    ),
    Template(
        "orchard",
        {
            "trees": range(3, 13),
            "each": range(5, 26),
            "rotten": range(3, 60),
            "bag": range(3, 13),
            "price": range(2, 13),
        },
        (
            (
                "{A} picks {each} {item}s from each of {trees} trees. {rotten} {item}s are rotten. {He} "
                "packs half of the good ones into bags of {bag} and sells each bag for ${price}. How many "
                "dollars does {he} get?"
            ),
            (
                "There are {trees} trees with {each} {item}s each. {A} picks them all, throws away {rotten} "
                "bad ones, keeps half of the rest and sells the other half in bags of {bag} for ${price} a "
                "bag. How much money does {he} make, in dollars?"
            ),
        ),
        (
            "{A} picks [picked = trees * each] {item}s.",
            "There are [good = picked - rotten] good ones.",
            "Half of them is [half = good / 2] {item}s.",
            "They fill [bags = half / bag] bags.",
            "The bags bring [$money = bags * price].",
        ),
        {"item": FRUITS},
    ),
    Template(
        "shopping",
        {
            "many": range(2, 9),
            "price": range(2, 16),
            "others": range(2, 9),
            "other_price": range(2, 16),
            "coupon": range(2, 21),
            "paid": (50, 60, 80, 100, 120, 150, 200),
        },
        (
            (
                "{A} buys {many} {item}s for ${price} each and {others} {other}s for ${other_price} each. "
                "{He} uses a coupon for ${coupon} and pays with ${paid}. How many dollars of change does "
                "{he} get?"
            ),
            (
                "In a shop a {item} costs ${price} and a {other} costs ${other_price}. {A} takes {many} "
                "{item}s and {others} {other}s, has ${coupon} taken off by a coupon and hands over ${paid}. "
                "How much change is {he} given, in dollars?"
            ),
        ),
        (
            "The {item}s cost [$first = many * price].",
            "The {other}s cost [$second = others * other_price].",
            "Together they cost [$both = first + second].",
            "With the coupon it is [$cost = both - coupon].",
            "The change is [$change = paid - cost].",
        ),
        {"item": ("plate", "towel", "cushion", "basket"), "other": ("cup", "spoon", "candle", "bowl")},
    ),
    Template(
        "team_run",
        {"first": range(3, 30), "more": range(2, 20), "goal": range(80, 301), "days": range(2, 10)},
        (
            (
                "{A} wants to {move} {goal} miles. In the first week {he} does {first} miles, in the second "
                "{more} miles more, and in the third twice as many as in the second. {He} splits the rest "
                "evenly over {days} days. How many miles a day is that?"
            ),
            (
                "{A}'s goal is to {move} {goal} miles. {He} did {first} miles in week one, {more} more than "
                "that in week two and double the miles of week two in week three. If {he} does the rest in "
                "{days} equal days, how many miles does {he} do each day?"
            ),
        ),
        (
            "The second week is [second = first + more] miles.",
            "The third week is [third = 2 * second] miles.",
            "All three are [done = first + second + third] miles.",
            "There are [rest = goal - done] miles left.",
            "Each day is [each = rest / days] miles.",
        ),
        {"move": ("run", "walk", "row", "cycle")},
    ),
)
