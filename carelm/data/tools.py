"""Tool calls of a message and tools of a row -> the shape that chat templates know (OpenAI's, arguments as objects).

Members that are null are left out of arguments and schemas that come as objects, because Parquet and Hub datasets fill
objects up with the members of the other rows; JSON text can hold no such filling and is taken as it is.
"""

import json
from collections import Counter
from typing import Any

from carelm.data.values import is_empty, is_missing, plain
from carelm.errors import UserError

ARGUMENTS = ("arguments", "parameters", "args", "input")
OF_A_CALL = ("name", "id", "type", "index", "description", "call_id", "function")


def parse_json(text: str, problem: str) -> Any:
    """JSON text -> its value, NaN as None; raises UserError(problem) where it is none, or an object has a key twice."""

    def to_dict(members: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := [key for key, number in Counter(key for key, _ in members).items() if number > 1]:
            source = problem.partition(": ")[0]
            raise UserError(f"{source}: the key {twice[0]!r} stands twice in one object of JSON text; remove one")
        return dict(members)

    try:
        return json.loads(text, parse_constant=lambda _: None, object_pairs_hook=to_dict)
    except (ValueError, RecursionError):
        raise UserError(problem) from None


def to_rows(value: Any) -> Any:
    """An object of lists, as Hub datasets hold a sequence of objects -> the list of objects; all else as it is."""
    lists = {key: v for key, v in value.items() if not is_missing(v)} if isinstance(value, dict) else {}
    if all(isinstance(v, (list, tuple)) for v in lists.values()) and len({len(v) for v in lists.values()}) == 1:
        return [dict(zip(lists, members)) for members in zip(*lists.values())]
    return value


def to_tool_calls(source: str, value: Any) -> list[dict[str, Any]]:
    """Tool calls as a list, one object or JSON text -> [{"type", "id" if given, "function": {"name", "arguments"}}].

    Raises:
        UserError: for a call without a name, and for arguments that are no object; none at all are {}.
    """
    value = _list_of(value, f"{source}: a message's tool calls")
    return [_to_tool_call(source, call) for call in value]


def _to_tool_call(source: str, call: Any) -> dict[str, Any]:
    function = call.get("function")
    if isinstance(function, str):
        function = parse_json(function, f"{source}: a tool call's function is text and no JSON object")
    if is_empty(function):
        function = call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise UserError(f"{source}: a tool call names no function; write {{name, arguments}}")
    name = function["name"]
    other = [key for key, value in function.items() if key not in OF_A_CALL and not is_empty(value)]
    if other and not any(key in function for key in ARGUMENTS):
        raise UserError(f"{source}: the tool call {name!r} has no arguments but {other[0]!r}; call it arguments")
    arguments = next((v for k in ARGUMENTS if not is_empty(v := function.get(k))), {})
    exact = isinstance(arguments, str)
    for _ in range(2):  # some logs hold JSON text in JSON text
        if isinstance(arguments, str) and arguments.strip():
            arguments = parse_json(arguments, f"{source}: the arguments of the tool call {name!r} are text and no JSON")
    is_blank = isinstance(arguments, str) and not arguments.strip()
    if is_blank or (arguments in (None, [], {}) if exact else is_empty(arguments)):
        arguments = {}
    if not isinstance(arguments, dict):
        raise UserError(f"{source}: the arguments of the tool call {name!r} are no object but {arguments!r:.60}")
    arguments = arguments if exact else plain(arguments, f"{source}: a tool call's arguments")
    identity = {} if is_empty(call.get("id")) else {"id": str(call["id"])}
    return {"type": "function", **identity, "function": {"name": name, "arguments": arguments}}


def to_tools(source: str, column: str, value: Any) -> list[dict[str, Any]] | None:
    """A row's tools as a list, one object or JSON text -> [{"type": "function", "function": schema}], None for none.

    Raises:
        UserError: for what is no function with a name.
    """
    tools = []
    for tool in _list_of(value, f"{source}: column '{column}'"):
        function = tool if is_empty(tool.get("function")) else tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(
                f"{source}: column '{column}' holds a tool that names no function; write its JSON schema (name, "
                'description, parameters), or set tools_column to another column ("" for none)'
            )
        if isinstance(function.get("parameters"), str) and function["parameters"].strip():
            problem = f"{source}: the parameters of the tool {function['name']!r} are text and no JSON"
            function = {**function, "parameters": parse_json(function["parameters"], problem)}
        schema = next((key for key in ("input_schema", "inputSchema") if not is_empty(function.get(key))), None)
        if schema and is_empty(function.get("parameters")):  # as Anthropic and MCP call them
            function = {"parameters" if key == schema else key: v for key, v in function.items() if key != "parameters"}
        tools.append({"type": "function", "function": function})
    return tools or None


def _list_of(value: Any, what: str) -> list[dict[str, Any]]:
    """A list of objects, however it is written; what was written as objects has lost its nulls."""
    if is_missing(value) or isinstance(value, str) and not value.strip():
        return []
    exact = isinstance(value, str)
    if exact:
        value = parse_json(value, f"{what}: text that is no JSON")
    value = to_rows(value if exact else plain(value, what))
    found = []
    for item in value if isinstance(value, list) else [value] if not is_empty(value) else []:
        item = parse_json(item, f"{what}: text that is no JSON object") if isinstance(item, str) else item
        if not isinstance(item, dict):
            raise UserError(f"{what}: {item!r:.60} stands where an object should")
        found.append(item)
    return found
