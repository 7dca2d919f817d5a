"""What the generator of the site needs to be told: lists within lists are indented by two spaces here, not by four."""

import re
from typing import Any

_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page with its inner lists indented as the generator reads them; code stays as it is."""
    parts = _FENCED.split(markdown)
    return "".join(
        part if part.startswith("```") else re.sub(r"^  - ", "    - ", part, flags=re.MULTILINE) for part in parts
    )
