"""What is shown while a run goes on."""

import io

from rich.console import Console

from student.files.run_directory import StepReport
from student.run.progress import StepDisplay


def show(console: Console, n_steps: int = 10) -> None:
    display = StepDisplay(0, n_steps, line_every=4, console=console)
    for step in range(1, n_steps + 1):
        display.show(StepReport(step, step / 5, 1.5, {}, 1e-3, 640.0, 0.25))
    display.close()


def test_plain_lines():
    """Without a terminal every fourth and the last step are one plain line each, however long."""
    console = Console(file=io.StringIO(), force_terminal=False, width=40)
    show(console)
    assert console.file.getvalue().splitlines() == [
        f"step {step}/10  epoch {step / 5:.2f}  loss 1.5000  640 images/s  25% waiting for data" for step in (4, 8, 10)
    ]


def test_bar():
    """On a terminal there is a bar that ends at the last step, with loss, speed and waiting time."""
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    show(console)
    assert "10/10" in console.file.getvalue()
    assert "loss 1.5000  640 images/s  25% waiting for data" in console.file.getvalue()
