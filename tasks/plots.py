"""Pictures of a run: the retention matrix as a heat map, and the curves of its stages."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from schemas.results import MatrixRow, RetentionMatrix
from schemas.stage import StepMetrics

CURVES = {
    "divergence": "divergence (nats a token)",
    "entropy": "student entropy (nats a token)",
    "completion_tokens": "completion length (tokens)",
    "clipped_share": "share of clipped completions",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens a second",
}


def heat_map(matrix: RetentionMatrix, path: Path) -> None:
    """Rows are stages from the base on, columns are suites; what did not pass is marked."""
    scores = np.array(
        [[np.nan if c is None else c.score for c in row.cells] for row in matrix.rows]
    )
    rows, columns = scores.shape
    figure, axes = plt.subplots(figsize=(2.6 + 0.95 * columns, 1.8 + 0.55 * rows), dpi=150)
    image = axes.imshow(scores, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    for (row, column), score in np.ndenumerate(scores):
        text = "-" if np.isnan(score) else f"{score:.2f}"
        colour = "white" if score > 0.6 else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color=colour)
    for row, content in enumerate(matrix.rows):
        if content.skill in matrix.suites:  # the cell in which the stage learned its own skill
            own = matrix.suites.index(content.skill)
            axes.add_patch(
                plt.Rectangle(
                    (own - 0.48, row - 0.46),
                    0.96,
                    0.92,
                    fill=False,
                    edgecolor="darkorange",
                    linewidth=2,
                )
            )
    axes.axvline(len(matrix.skills) - 0.5, color="black", linewidth=1.2)
    axes.set_xticks(range(columns), matrix.suites, rotation=30, ha="right")
    axes.set_yticks(range(rows), [_row_name(row) for row in matrix.rows])
    axes.tick_params(length=0)
    axes.set_title(f"{matrix.curriculum}: score after each stage", fontsize=11)
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def curves(stages: dict[str, list[StepMetrics]], path: Path) -> None:
    """Every stage's training metrics, one after the other along the steps."""
    figure, grid = plt.subplots(2, 3, figsize=(13, 6), dpi=130, constrained_layout=True)
    for axes, (metric, title) in zip(grid.flat, CURVES.items(), strict=True):
        offset = 0
        for name, lines in stages.items():
            steps = [offset + line.step for line in lines]
            axes.plot(steps, [line.metrics[metric] for line in lines], label=name, linewidth=1.3)
            offset = steps[-1] if steps else offset
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    grid[0, 0].legend(fontsize=9)
    figure.savefig(path)
    plt.close(figure)


def _row_name(row: MatrixRow) -> str:
    mark = {"refuse": " (refused)", "ask": " (ask)"}.get(row.decision or "pass", "")
    return f"{row.stage}  {row.skill or 'base'}{mark}"
