"""The two faces of a conversation as data: streamlit-chat asks the internet for any it is not given."""

from __future__ import annotations

import base64


def _face(background: str, shape: str) -> str:
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 48 48">'
        f'<rect width="48" height="48" rx="14" fill="{background}"/>{shape}</svg>'
    )
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


USER = _face(
    "#e2e2f6",
    '<g fill="#4f46e5"><circle cx="24" cy="19" r="7"/><path d="M10 40a14 11 0 0 1 28 0z"/></g>',
)
BOT = _face(
    "#4f46e5",
    '<g fill="none" stroke="#fff" stroke-width="2.6" stroke-linecap="round">'
    '<rect x="12" y="16" width="24" height="18" rx="6"/>'
    '<path d="M24 16v-5M19 24v3M29 24v3M8 24v4M40 24v4"/></g>'
    '<circle cx="24" cy="9.5" r="2.2" fill="#fff"/>',
)
