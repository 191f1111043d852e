"""Tools with the requests people make for them, written by hand: one list for training, one for the held-out set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tools.nano.answers import subject_of


@dataclass(frozen=True)
class SpokenTool:
    """`forms` have a slot for each parameter. `lists`: several values may stand in the slot of the only parameter.
    `about`: what the answer is about where the request does not have it in its own words."""

    name: str
    noun: str
    description: str
    properties: dict[str, Any]
    forms: tuple[str, ...]
    lists: bool = False
    about: str = ""

    def subject(self, form: str) -> str:
        """What the answer to a request of this form is about, with slots."""
        return subject_of(form, self.noun, self.about or f"the {self.noun}")

    def definition(self) -> dict[str, Any]:
        shape = {"properties": self.properties, "required": list(self.properties), "type": "object"}
        return {"name": self.name, "description": self.description, "parameters": shape}


_S, _I, _N = {"type": "string"}, {"type": "integer"}, {"type": "number"}

TRAIN_TOOLS = (
    SpokenTool(
        "get_weather",
        "weather",
        "Get the weather for a city.",
        {"city": _S},
        (
            "What is the weather in {city}",
            "How is the weather in {city}",
            "get the weather for {city}",
            "tell me the weather in {city}",
            "check the weather of {city}",
        ),
        True,
        about="the weather in {city}",
    ),
    SpokenTool(
        "weather",
        "weather",
        "Weather now in a city.",
        {"city": _S},
        ("What is the weather in {city}", "weather in {city}", "weather for {city}"),
        True,
        about="the weather in {city}",
    ),
    SpokenTool(
        "get_time",
        "time",
        "Current time in a city.",
        {"city": _S},
        ("What time is it in {city}", "What is the time in {city}", "tell me the time in {city}"),
        True,
        about="the time in {city}",
    ),
    SpokenTool(
        "get_population",
        "population",
        "How many people live in a city.",
        {"city": _S},
        ("What is the population of {city}", "How many people live in {city}", "find the population of {city}"),
        True,
        about="the population of {city}",
    ),
    SpokenTool(
        "add",
        "add",
        "Add two numbers.",
        {"a": _I, "b": _I},
        ("What is {a} plus {b}", "add {a} and {b}", "What is {a} + {b}", "sum {a} and {b}", "How much is {a} plus {b}"),
        about="the result",
    ),
    SpokenTool(
        "sum",
        "sum",
        "Adds two numbers.",
        {"x": _I, "y": _I},
        ("What is {x} plus {y}", "add {x} and {y}", "add {y} to {x}", "What is {x} + {y}"),
        about="the result",
    ),
    SpokenTool(
        "times",
        "times",
        "Multiplies two numbers.",
        {"x": _N, "y": _N},
        ("What is {x} times {y}", "multiply {x} by {y}", "What is {x} * {y}"),
        about="the result",
    ),
    SpokenTool(
        "multiply",
        "multiply",
        "Multiply two numbers.",
        {"a": _I, "b": _I},
        ("What is {a} times {b}", "multiply {a} by {b}", "What is {a} * {b}", "multiply {a} and {b}"),
        about="the result",
    ),
    SpokenTool(
        "subtract",
        "subtract",
        "Subtract b from a.",
        {"a": _I, "b": _I},
        ("What is {a} minus {b}", "subtract {b} from {a}", "What is {a} - {b}"),
        about="the result",
    ),
    SpokenTool(
        "search",
        "search",
        "Search the web.",
        {"query": _S},
        ("search for {query}", "search the web for {query}", "look up {query}", "find out about {query}"),
        True,
        about="the search for {query}",
    ),
    SpokenTool(
        "search_docs",
        "docs",
        "Search the documentation.",
        {"query": _S},
        ("search the docs for {query}", "look in the docs for {query}", "What do the docs say about {query}"),
        True,
        about="the docs on {query}",
    ),
    SpokenTool(
        "read_file",
        "file",
        "Read a file.",
        {"name": _S},
        ("read the file {name}", "open the file {name}", "show me the file {name}"),
        True,
        about="the file {name}",
    ),
    SpokenTool(
        "send_email",
        "email",
        "Send an email.",
        {"person": _S, "subject": _S},
        (
            "send an email to {person} about {subject}",
            "email {person} about {subject}",
            "write {person} an email on {subject}",
        ),
        about="the email to {person} about {subject}",
    ),
    SpokenTool(
        "book_hotel",
        "hotel",
        "Book a hotel.",
        {"city": _S, "nights": _I},
        ("book a hotel in {city} for {nights} nights", "find me a hotel in {city}, {nights} nights"),
        about="the hotel in {city} for {nights} nights",
    ),
    SpokenTool(
        "book_flight",
        "flight",
        "Book a flight.",
        {"origin": _S, "city": _S},
        (
            "book a flight from {origin} to {city}",
            "fly me from {origin} to {city}",
            "get a flight to {city} from {origin}",
        ),
        about="the flight from {origin} to {city}",
    ),
    SpokenTool(
        "lookup_order",
        "order",
        "Look up an order.",
        {"id": _S},
        ("Where is my order {id}", "look up order {id}", "What is the status of order {id}"),
        True,
        about="the order {id}",
    ),
    SpokenTool(
        "get_price",
        "price",
        "Price of a product.",
        {"product": _S},
        ("What is the price of {product}", "How much is {product}", "What does {product} cost"),
        True,
        about="the price of {product}",
    ),
    SpokenTool(
        "set_timer",
        "timer",
        "Set a timer.",
        {"minutes": _I},
        ("set a timer for {minutes} minutes", "start a {minutes} minute timer", "wake me in {minutes} minutes"),
        about="the timer for {minutes} minutes",
    ),
    SpokenTool(
        "convert",
        "convert",
        "Convert an amount to a currency.",
        {"amount": _N, "currency": _S},
        ("convert {amount} to {currency}", "What is {amount} in {currency}", "change {amount} into {currency}"),
        about="{amount} in {currency}",
    ),
    SpokenTool(
        "translate",
        "translate",
        "Translate a text.",
        {"text": _S, "language": _S},
        ("translate {text} into {language}", "translate {text} to {language}", "How do you say {text} in {language}"),
        about="{text} in {language}",
    ),
    SpokenTool(
        "play_song",
        "song",
        "Play a song.",
        {"title": _S},
        ("play {title}", "play the song {title}", "I want to hear {title}"),
        True,
        about="the song {title}",
    ),
    SpokenTool(
        "list_files",
        "files",
        "List the files.",
        {},
        ("list the files", "show all files", "What files are there"),
        about="the files",
    ),
    SpokenTool(
        "get_date",
        "date",
        "Today's date.",
        {},
        ("What is the date", "tell me the date", "What day is it today"),
        about="the date",
    ),
    SpokenTool(
        "write_file",
        "file",
        "Write a file.",
        {"name": _S, "text": _S},
        ("write {text} to the file {name}", "write the file {name} with {text}", "save {text} as {name}"),
        about="the file {name}",
    ),
    SpokenTool("run_tests", "tests", "Run the tests.", {}, ("run the tests", "test it", "are the tests fine")),
    SpokenTool(
        "delete_file",
        "file",
        "Delete a file.",
        {"path": _S},
        ("delete the file {path}", "remove {path}"),
        True,
        about="the file {path}",
    ),
)

HELD_TOOLS = (
    SpokenTool(
        "get_tide",
        "tide",
        "Get the tide at a port.",
        {"port": _S},
        ("What is the tide at {port}", "get the tide at {port}"),
        True,
    ),
    SpokenTool(
        "get_traffic",
        "traffic",
        "Traffic in a city.",
        {"city": _S},
        ("How is the traffic in {city}", "tell me the traffic in {city}"),
        True,
    ),
    SpokenTool(
        "find_recipe",
        "recipe",
        "Find a recipe.",
        {"dish": _S},
        ("find a recipe for {dish}", "What is the recipe for {dish}"),
        True,
    ),
    SpokenTool(
        "reserve_table",
        "table",
        "Reserve a table.",
        {"name": _S, "seats": _I},
        ("reserve a table for {name} with {seats} seats", "reserve a table, name {name}, seats {seats}"),
        about="the table for {name}",
    ),
    SpokenTool(
        "call_taxi", "taxi", "Call a taxi.", {"origin": _S, "place": _S}, ("call a taxi from {origin} to {place}",)
    ),
    SpokenTool(
        "track_parcel",
        "parcel",
        "Track a parcel.",
        {"code": _S},
        ("track the parcel {code}", "Where is my parcel {code}"),
        True,
    ),
    SpokenTool("list_users", "users", "List the users.", {}, ("list the users", "show all users")),
    SpokenTool(
        "divide",
        "divide",
        "Divide two numbers.",
        {"a": _I, "b": _I},
        ("divide {a} by {b}", "What is {a} divided by {b}"),
        about="the result",
    ),
)
