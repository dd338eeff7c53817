"""`docs/configuration.md`: every key with its variable, default, bounds and reason, as the structures have them.

Pure. `python -m edge.config` prints it; a test keeps the page equal.
"""

from __future__ import annotations

from edge.config_sections import KEYS, SECTIONS
from edge.config_values import Key


def reference() -> str:
    """`docs/configuration.md`, made from the structures of config_sections.py."""
    lines = [
        "# Configuration",
        "",
        "<!-- Made by `python -m edge.config`; change edge/config_*.py instead. -->",
        "",
        "Every key has a default that works, and a reason for it. A key is set in `gatehouse.toml` or by the variable",
        "next to it, which beats the file; `--data-dir` beats both. The file is `--config F`, else",
        "`$GATEHOUSE_CONFIG`, else `gatehouse.toml` in the current directory, else `/etc/gatehouse/gatehouse.toml`.",
        "",
        "- Root reads the file in the current directory unasked only if it is root's and nobody else may write it.",
        "- A relative path in the file starts at the file's directory; anywhere else at the current directory.",
        "- Lists in variables are JSON or separated by commas. An empty variable counts as not set.",
        "- An unknown key, section or variable, a wrong type or a value out of range stops the start with exit code 2,",
        "  before any socket opens; the message names the key, the reason and what is allowed.",
        "- `gatehouse check-config` shows what a node would run with, secrets masked.",
        "",
        "```toml",
        'data_dir = "/srv/gatehouse"',
        "",
        "[https]",
        'host = "0.0.0.0"',
        'names = ["gate.example.org"]',
        "",
        "[telemetry]",
        "retention_days = 30",
        "```",
        "",
        "## Top level",
        "",
        *_table(""),
    ]
    for name, structure in SECTIONS.items():
        lines += ["", f"## [{name}]", "", (structure.__doc__ or "").strip(), "", *_table(name)]
    return "\n".join(lines) + "\n"


def _table(section: str) -> list[str]:
    rows = ["| Key | Variable | Default | Allowed | What, and why this default |", "|---|---|---|---|---|"]
    for key in KEYS.values():
        if key.section == section:
            cells = (f"`{key.name}`", f"`{key.variable}`", _default(key), key.allowed, key.description)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def _default(key: Key) -> str:
    if key.default_text is not None:
        return key.default_text
    match key.default:
        case None:
            return "none"
        case bool():
            return str(key.default).lower()
        case int():
            return f"{key.default:,}" if key.default > 9999 and key.name != "port" else str(key.default)
        case float():
            return f"{key.default:,g}"
        case _:
            return f"`{key.default}`"
