"""What the API says about its paths, without scripts or internet.

Answers to nothing in the official `api.py`. FastAPI's own page loads scripts from other servers.
"""

import html
import json


def endpoints(app) -> list[str]:
    """["GET /health: What it does.", …] of a FastAPI application."""
    return [
        f"{method.upper()} {path}: {operation.get('description') or operation['summary']}"
        for path, operations in app.openapi()["paths"].items()
        for method, operation in operations.items()
    ]


def names(app) -> str:
    """The methods and paths of a FastAPI application in one line: "GET /health, POST /"."""
    return ", ".join(line.partition(":")[0] for line in endpoints(app))


def docs_page(app) -> str:
    """HTML that shows every path with its fields, from the same schema as /openapi.json."""
    schema = app.openapi()
    parts = []
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(operation.get('description', ''))}</p>")
            for content in operation.get("requestBody", {}).get("content", {}).values():
                parts.append(fields_table(schema, content["schema"]))
    title = html.escape(schema["info"]["title"])
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
        f"<body><main><h1>{title}</h1><p>{html.escape(schema['info'].get('description', ''))}</p>"
        f'<p>The schema for programs: <a href="openapi.json">openapi.json</a></p>{"".join(parts)}</main></body></html>'
    )


def fields_table(schema, body):
    """The fields of a request body."""
    model = schema["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    required = model.get("required", [])
    rows = [
        f"<tr><td><code>{html.escape(name)}</code>{' (needed)' if name in required else ''}</td>"
        f"<td>{html.escape(field.get('description', ''))}</td>"
        f"<td><code>{html.escape(name_of(field))}</code></td></tr>"
        for name, field in model["properties"].items()
    ]
    return f"<table><tr><th>Field</th><th>Meaning</th><th>Type</th></tr>{''.join(rows)}</table>"


def name_of(kind):
    """A field's type and bounds in a few words."""
    if "anyOf" in kind:
        return " or ".join(name_of(each) for each in kind["anyOf"] if each.get("type") != "null")
    if "$ref" in kind:
        return kind["$ref"].rpartition("/")[2]
    bounds = {"minimum": "at least", "maximum": "at most"}
    words = [f"{word} {json.dumps(kind[key])}" for key, word in bounds.items() if key in kind]
    name = f"array of {name_of(kind['items'])}" if "items" in kind else kind.get("type", "any")
    return ", ".join([name, *words])


STYLE = (
    "body{font-family:system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;line-height:1.5}"
    "table{border-collapse:collapse}td,th{border:1px solid #999;padding:.2rem .6rem;text-align:left}"
)
