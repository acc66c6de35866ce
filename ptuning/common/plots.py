"""The pictures of a run: its losses, or the scores of its checkpoints, over the steps."""

import io

from common.files import write_bytes


def new_figure(width, height, rows=1, columns=1):
    """(figure of so many inches, its rows * columns axes in a list), drawn without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharex="col").ravel()


def draw_lines(axes, lines: dict, marker=None, **settings) -> None:
    """Draw {label: [(step, value)]}, each in the colour of its place; a line without points is left out."""
    for index, (label, points) in enumerate(lines.items()):
        # A plot fails beside a number near the largest one there is.
        if points := [(step, value) for step, value in points if abs(value) < 1e30]:
            each = marker or ("." if len(points) < 50 else None)
            axes.plot(*zip(*points, strict=True), color=f"C{index}", label=label, marker=each)
    axes.set(**settings)
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()


def picture_of(figure) -> bytes:
    """The figure as PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    return picture.getvalue()


def plot_loss(log_history: list[dict], file) -> None:
    """Draw the training loss, and the dev loss where there is one, over the steps of a `trainer_state.json`; the drift has
    an axis of its own on the right."""
    figure, (axes,) = new_figure(7, 4)
    lines = {
        label: [(entry["step"], entry[key]) for entry in log_history if key in entry]
        for key, label in (("loss", "training loss"), ("eval_loss", "dev loss"))
    }
    draw_lines(axes, lines, xlabel="step", ylabel="loss (nats per token)")
    if drift := [(entry["step"], entry["drift"]) for entry in log_history if "drift" in entry]:
        other = axes.twinx()
        draw_lines(other, {"training loss": [], "dev loss": [], "drift": drift}, ylabel="drift (nats per token)")
        other.grid(visible=False)
    write_bytes(file, picture_of(figure))


def plot_checkpoints(table: dict[str, dict[str, float]], file) -> None:
    """Draw scores, and the dev loss where there is one, over the steps of {"checkpoint-100": {"dev_loss": …}, …}."""
    names = list(dict.fromkeys(name for scores in table.values() for name in scores))
    losses = [name for name in names if name == "dev_loss"]
    panels = [panel for panel in (losses, [name for name in names if name not in losses]) if panel]
    figure, all_axes = new_figure(7, 4 if len(panels) < 2 else 6, rows=max(1, len(panels)))
    for axes, panel in zip(all_axes, panels, strict=False):
        lines = {
            name: [(int(key.removeprefix("checkpoint-")), row[name]) for key, row in table.items() if name in row]
            for name in panel
        }
        draw_lines(axes, lines, "o", ylabel="loss (nats per token)" if panel == losses else "score (percent)")
    all_axes[-1].set(xlabel="step")
    write_bytes(file, picture_of(figure))
