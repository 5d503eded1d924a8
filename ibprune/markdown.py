"""Names in Markdown: a model, a data set or a layer may be called anything, and is shown as what it is called."""

import json
import re

from ibprune.console import printable


def code(text: str) -> str:
    """A span of code that shows the text.

    Example:
        >>> code("a model"), code("`a`")
        ('`a model`', '`` `a` ``')
    """
    text = " ".join(printable(text).split())
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def plain(text: str) -> str:
    r"""Text that is no markup, neither Markdown nor HTML, in one line.

    Example:
        >>> print(plain("<b>|*x*"))
        &lt;b&gt;\|\*x\*
    """
    text = re.sub(r"([\\`*|]|(?<!\w)_|_(?!\w)|(?<=\])\()", r"\\\1", " ".join(printable(text).split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def block(text: str, language: str) -> str:
    """A fenced block that shows the text, in one line.

    Example:
        >>> print(block("ls", "bash"))
        ```bash
        ls
        ```
    """
    text = printable(text).replace("\n", "\\n")
    fence = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def quoted(text: str) -> str:
    r"""A string of Python, whatever the text holds.

    Example:
        >>> print(quoted('a"b'))
        "a\"b"
    """
    return json.dumps(printable(text), ensure_ascii=False)
