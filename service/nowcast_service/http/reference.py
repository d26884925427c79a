"""The routes for people, from the OpenAPI document: one page that loads nothing, so that it works without a network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code,pre{font:14px/1.4 ui-monospace,monospace}pre{background:#8881;padding:.7rem;overflow:auto}"
    "td,th{text-align:left;padding:.2rem 1rem .2rem 0;vertical-align:top}"
)


def reference(document: dict[str, Any]) -> str:
    """The page.

    Args:
        document: The OpenAPI document.
    """
    body = "\n".join(_parts(document))
    title = escape(document["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def _parts(document: dict[str, Any]) -> Iterator[str]:
    info = document["info"]
    yield f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info['description'])}</p>"
    yield '<p>The same for machines: <a href="openapi.json">openapi.json</a>.</p>'
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
            yield f"<p><b>{escape(operation.get('summary', ''))}</b>. {escape(operation.get('description', ''))}</p>"
            yield from _parameters(operation.get("parameters", []))
            for kind, body in operation.get("requestBody", {}).get("content", {}).items():
                yield f"<p>Body: <code>{escape(kind)}</code> {_schema(body.get('schema', {}))}</p>"
                if "example" in body:
                    yield f"<pre>{escape(json.dumps(body['example'], indent=1))}</pre>"
            yield "<table>"
            for status, answer in operation["responses"].items():
                kinds = ", ".join(f"{k} {_schema(c.get('schema', {}))}" for k, c in answer.get("content", {}).items())
                yield f"<tr><td>{status}<td>{escape(answer.get('description', ''))}<td>{kinds}"
            yield "</table>"
    for name, schema in sorted(document.get("components", {}).get("schemas", {}).items()):
        yield f'<h3 id="{escape(name)}">{escape(name)}</h3><pre>{escape(json.dumps(schema, indent=1))}</pre>'


def _parameters(parameters: list[dict[str, Any]]) -> Iterator[str]:
    if parameters:
        yield "<table>"
        for one in parameters:
            yield (
                f"<tr><td>{escape(one['in'])}<td><code>{escape(one['name'])}</code>"
                f"<td>{'' if one.get('required') else 'optional'}<td>{escape(one.get('description', ''))}"
            )
        yield "</table>"


def _schema(schema: dict[str, Any]) -> str:
    name = str(schema.get("$ref", "")).rpartition("/")[2]
    return f'<a href="#{escape(name)}">{escape(name)}</a>' if name else ""
