"""Draw docs/img/method.svg: how W + B·A goes through the rounding into INT4 codes.

    python docs/make_drawing.py

The numbers in the drawing are computed here: a small weight matrix with one group per row, an adapter of rank 2, and
the formula of src/nybble/quant/grid.py. Cells whose code the adapter changes are outlined.
"""

from __future__ import annotations

import random
from pathlib import Path

ROWS, COLUMNS, RANK, CELL = 6, 8, 2, 26
WIDTH, HEIGHT = 1000, 372
INK, GREY, ACCENT, GRADIENT = "#1f2933", "#6b7280", "#d9480f", "#1971c2"
MAX_CODE = 15

Matrix = list[list[float]]


def product(left: Matrix, right: Matrix) -> Matrix:
    """The matrix product."""
    return [
        [sum(a * b for a, b in zip(row, column, strict=True)) for column in zip(*right, strict=True)] for row in left
    ]


def codes(weight: Matrix, ranges: Matrix) -> list[list[int]]:
    """clamp(round(w / scale) + zero point, 0, 15); each row is a group, and its range is that of a row of `ranges`."""
    result = []
    for row, given in zip(weight, ranges, strict=True):
        low, high = min(0.0, *given), max(0.0, *given)
        scale = (high - low) / MAX_CODE
        zero_point = round(-low / scale)
        result.append([min(max(round(w / scale) + zero_point, 0), MAX_CODE) for w in row])
    return result


def mix(share: float, one: tuple[int, int, int], other: tuple[int, int, int]) -> str:
    """A color between two."""
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(one, other, strict=True))


def shade(value: float, largest: float) -> str:
    """White for 0, orange for positive and blue for negative values."""
    share = min(abs(value) / largest, 1.0)
    return mix(share, (255, 255, 255), (240, 140, 60) if value > 0 else (70, 130, 200))


def text(x: float, y: float, content: str, size: int = 14, color: str = INK, bold: bool = False) -> str:
    """A line of text, centered at x."""
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="middle"{weight}>{content}</text>'


def heatmap(x: float, y: float, values: Matrix, largest: float) -> list[str]:
    """A matrix as shaded cells."""
    return [
        f'<rect x="{x + j * CELL:g}" y="{y + i * CELL:g}" width="{CELL}" height="{CELL}" '
        f'fill="{shade(value, largest)}" stroke="#c4c9d0"/>'
        for i, row in enumerate(values)
        for j, value in enumerate(row)
    ]


def code_cells(x: float, y: float, shown: list[list[int]], before: list[list[int]]) -> list[str]:
    """A matrix of codes; those that differ from `before` are outlined."""
    parts, outlines = [], []
    for i, row in enumerate(shown):
        for j, code in enumerate(row):
            left, top, changed = x + j * CELL, y + i * CELL, code != before[i][j]
            fill = mix(code / MAX_CODE, (255, 255, 255), (178, 186, 196))
            parts.append(
                f'<rect x="{left:g}" y="{top:g}" width="{CELL}" height="{CELL}" fill="{fill}" stroke="#c4c9d0"/>'
            )
            parts.append(
                text(left + CELL / 2, top + CELL / 2 + 5, str(code), 13, ACCENT if changed else INK, bold=changed)
            )
            if changed:
                outlines.append(
                    f'<rect x="{left + 1:g}" y="{top + 1:g}" width="{CELL - 2}" height="{CELL - 2}" fill="none" '
                    f'stroke="{ACCENT}" stroke-width="2"/>'
                )
    return parts + outlines


def arrow(x: float, y: float, length: float) -> str:
    """An arrow to the right."""
    return f'<path d="M {x:g} {y:g} h {length - 8:g}" stroke="{INK}" stroke-width="2" marker-end="url(#head)"/>'


def drawing() -> str:
    """The SVG."""
    random.seed(11)
    weight = [[random.gauss(0, 1) for _ in range(COLUMNS)] for _ in range(ROWS)]
    lora_b = [[random.gauss(0, 0.2) for _ in range(RANK)] for _ in range(ROWS)]
    lora_a = [[random.gauss(0, 0.35) for _ in range(COLUMNS)] for _ in range(RANK)]
    moved = [
        [w + d for w, d in zip(row, change, strict=True)]
        for row, change in zip(weight, product(lora_b, lora_a), strict=True)
    ]
    before, after = codes(weight, weight), codes(moved, weight)

    top, middle = 92, 92 + ROWS * CELL / 2
    w_x, b_x, a_x, codes_x = 28, 276, 340, 676
    parts = [
        *heatmap(w_x, top, weight, 2.2),
        text(w_x + COLUMNS * CELL / 2, 44, "W", 20, bold=True),
        text(w_x + COLUMNS * CELL / 2, 66, "16-bit weight, frozen", 14, GREY),
        text(255, middle + 8, "+", 24),
        *heatmap(b_x, top, lora_b, 0.7),
        text(b_x + RANK * CELL / 2 + 126, 44, "B · A", 20, bold=True),
        text(b_x + RANK * CELL / 2 + 126, 66, "LoRA adapter, trained", 14, GREY),
        text(334, middle + 6, "·", 24),
        *heatmap(a_x, middle - RANK * CELL / 2, lora_a, 0.7),
        arrow(560, middle, 104),
        text(608, middle - 38, "÷ scale, round,", 13),
        text(608, middle - 20, "+ zero point", 13),
        text(608, middle + 24, "clamp to 0 … 15", 13),
        *code_cells(codes_x, top, after, before),
        text(codes_x + COLUMNS * CELL / 2, 44, "INT4 codes", 20, bold=True),
        text(codes_x + COLUMNS * CELL / 2, 66, "outlined: changed by B · A", 14, ACCENT),
        text(codes_x + COLUMNS * CELL + 54, middle - 30, "− zero point,", 13),
        text(codes_x + COLUMNS * CELL + 54, middle - 12, "× scale", 13),
        arrow(codes_x + COLUMNS * CELL + 10, middle, 88),
        text(codes_x + COLUMNS * CELL + 54, middle + 24, "matrix product", 13),
        # The gradient, from the loss back to the adapter.
        f'<path d="M {WIDTH - 60} {top + ROWS * CELL + 16} v 22 H 420 v -18" fill="none" stroke="{GRADIENT}" '
        f'stroke-width="2" stroke-dasharray="6 5" marker-end="url(#back)"/>',
        text(700, top + ROWS * CELL + 58, "gradient of the loss, straight through the rounding", 14, GRADIENT),
        text(
            WIDTH / 2, HEIGHT - 22,
            "Training computes with the codes. They are what is exported; W, B and A are dropped.", 16,
        ),
    ]  # fmt: skip
    head = (
        '<marker id="{}" viewBox="0 0 10 10" refX="2" refY="5" markerWidth="5" markerHeight="5" orient="auto">'
        '<path d="M0 0 L10 5 L0 10z" fill="{}"/></marker>'
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, '
            f'-apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif" role="img">',
            "<title>W + B·A is divided by the scale, rounded and clamped to INT4 codes, which training and export share"
            "</title>",
            "<defs>" + head.format("head", INK) + head.format("back", GRADIENT) + "</defs>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    path = Path(__file__).parent / "img" / "method.svg"
    path.parent.mkdir(exist_ok=True)
    path.write_text(drawing(), encoding="utf-8")
    print(path)
