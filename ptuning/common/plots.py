"""The pictures of a run: its losses, or the scores of its checkpoints, over the steps."""

import io

from common.files import write_bytes


def new_figure(rows=1):
    """(figure, its `rows` axes one above the other), drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4 if rows == 1 else 3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, squeeze=False, sharex=True)[:, 0]


def save_figure(figure, file):
    """Write a PNG completely or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write_bytes(file, picture.getvalue())


def drawable(points) -> list[tuple[int, float]]:
    """The points (step, loss) that a plot can show: it fails beside a number near the largest one there is."""
    return [(step, loss) for step, loss in points if abs(loss) < 1e30]


def plot_loss(log_history: list[dict], file) -> None:
    """Draw the training loss, and the dev loss where there is one, over the steps of a `trainer_state.json`."""
    figure, (axes,) = new_figure()
    for key, label in (("loss", "training loss"), ("eval_loss", "dev loss")):
        points = drawable((entry["step"], entry[key]) for entry in log_history if key in entry)
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 50 else None)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    save_figure(figure, file)


def plot_checkpoints(table: dict[str, dict[str, float]], file) -> None:
    """Draw scores, and the dev loss where there is one, over the steps of {"checkpoint-100": {"dev_loss": …}, …}."""
    names = list(dict.fromkeys(name for scores in table.values() for name in scores))
    losses = [name for name in names if name == "dev_loss"]
    panels = [panel for panel in (losses, [name for name in names if name not in losses]) if panel]
    figure, all_axes = new_figure(max(1, len(panels)))
    for axes, panel in zip(all_axes, panels, strict=False):
        for name in panel:
            points = [(int(key.removeprefix("checkpoint-")), row[name]) for key, row in table.items() if name in row]
            axes.plot(*zip(*points, strict=True), label=name, marker="o")
        axes.set(ylabel="loss (nats per token)" if panel == losses else "score (percent)")
        axes.grid(alpha=0.3)
        axes.legend()
    all_axes[-1].set(xlabel="step")
    save_figure(figure, file)
