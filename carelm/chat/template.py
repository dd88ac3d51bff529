"""Chat templates: read from a file, found sound, and with one fixed day in place of today's."""

import datetime
from typing import TYPE_CHECKING, Any

from carelm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Templates that print today's date (Llama 3.1 and later) would make other tokens of the same rows tomorrow. This is the
# day that Llama's own template falls back to.
DAY = datetime.datetime(2024, 7, 26)


def read_template(path: str) -> str:
    """The text of the recipe's template file.

    Raises:
        UserError: where it cannot be read, is no UTF-8, begins with a byte order mark or is empty.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise UserError(f"chat_template_path: {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"chat_template_path: {path} is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}); "
            "save it as UTF-8"
        ) from None
    if not text.strip():
        raise UserError(f"chat_template_path: {path} is empty; write a chat template into it")
    return text


def settle(template: str | dict[str, str], where: str) -> str | dict[str, str]:
    """The template, or each of a tokenizer's named ones, with a fixed day; what cannot be rendered is refused.

    Args:
        where: what holds the template, for messages.

    Raises:
        UserError: for a template that is no Jinja, begins with a byte order mark or asks for the date in a format that only
            shows while it is rendered, and for named templates without a default.
    """
    if isinstance(template, dict):
        if "default" not in template:
            raise UserError(
                f"{where} is one of {', '.join(sorted(template))}, none of them called default; write the one to use to a "
                ".jinja file and set chat_template_path to it"
            )
        return {name: settle(text, f"{where}, '{name}'") for name, text in template.items()}
    if not isinstance(template, str):
        raise UserError(f"{where} is no text but {template!r:.60}; set chat_template_path to a .jinja file")
    if template.startswith("\ufeff"):
        raise UserError(
            f"{where} begins with a byte order mark, which would stand in every prompt; save it as UTF-8 without one"
        )
    return _with_fixed_day(template, where)


def _with_fixed_day(template: str, where: str) -> str:
    """With a macro `strftime_now` in front where the template calls it, so that it renders the same every day and in every
    server; from version 5.22 transformers takes no function of ours in its place."""
    from jinja2 import TemplateSyntaxError, nodes  # costs a tenth of a second, which --help need not wait
    from transformers.utils.chat_template_utils import _compile_jinja_template  # knows the tags that transformers adds

    try:
        tree = _compile_jinja_template(template).environment.parse(template)
    except TemplateSyntaxError as error:
        raise UserError(f"{where}, line {error.lineno} is no Jinja ({_one_line(error)}); mend the template") from None
    if any(isinstance(node, nodes.Macro) and node.name == "strftime_now" for node in tree.body):
        return template  # it has its own, or this one: the template of a result
    days: dict[str, str] = {}
    uses = {id(use.node): use for use in tree.find_all((nodes.Call, nodes.Test))}
    for name in tree.find_all(nodes.Name):
        use = uses.get(id(name))
        if name.name != "strftime_now" or name.ctx == "store" or isinstance(use, nodes.Test):  # "is defined"
            continue
        try:
            (given,) = use.args + [keyword.value for keyword in use.kwargs]
            days[given.as_const()] = DAY.strftime(given.as_const())
        except (AttributeError, ValueError, TypeError, nodes.Impossible):
            raise UserError(
                f"{where}, line {name.lineno} uses strftime_now with no literal format, so that the day cannot be fixed; "
                "write the format there as text"
            ) from None
    if not days:
        return template
    known = " else ".join(f"{_quoted(day)} if format == {_quoted(form)}" for form, day in days.items())
    other = "raise_exception('strftime_now: a format that does not stand in the template')"
    # The line's end is eaten (`trim_blocks`), and what follows stands at a line's beginning as before.
    return f"{{%- macro strftime_now(format) %}}{{{{ {known} else {other} }}}}{{% endmacro %}}\n{template}"


def write(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict[str, Any]],
    tools: list[dict] | None = None,
    *,
    for_answer: bool,
) -> str:
    """The text of a conversation; with `for_answer` up to and including the generation prompt.

    Raises:
        UserError: where the template refuses it, or fails in any other way: it is a program of its own.
    """
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=False, add_generation_prompt=for_answer
        )
    except Exception as error:
        reason = (
            _one_line(error)
            if type(error).__name__ == "TemplateError"
            else f"{type(error).__name__}: {_one_line(error)}"
        )
        raise UserError(
            f"the chat template refuses this conversation ({reason}); mend the row or the system_prompt, or set another "
            "chat_template_path"
        ) from None


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
