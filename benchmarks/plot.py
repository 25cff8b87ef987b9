"""Bar charts as SVG text: the same figures give the same bytes, so that a stale chart is noticed."""

from html import escape

_LEFT, _WIDTH, _RIGHT, _ROW, _TOP = 130, 420, 110, 26, 34


def bars(title: str, rows: list[tuple[str, float, str]], ours: str) -> str:
    """Horizontal bars.

    Args:
        title: above them.
        rows: name, length, and the words at the bar's end.
        ours: the name whose bar is coloured.
    """
    longest = max(value for _, value, _ in rows)
    height = _TOP + _ROW * len(rows) + 8
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + _RIGHT}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{_LEFT + _WIDTH + _RIGHT}" height="{height}" fill="#ffffff"/>',
        f'<text x="8" y="20" font-weight="bold">{escape(title)}</text>',
    ]
    for number, (name, value, words) in enumerate(rows):
        y = _TOP + _ROW * number
        length = _WIDTH * value / longest
        colour = "#2a6f97" if name == ours else "#b8b8b8"
        lines += [
            f'<text x="{_LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{_LEFT}" y="{y}" width="{length:.1f}" height="{_ROW - 6}" fill="{colour}"/>',
            f'<text x="{_LEFT + length + 6:.1f}" y="{y + 15}">{escape(words)}</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])
