"""The console scripts student-train, also as `python -m student`, student-eval, student-export and student-report."""

from teacher_cache.terminal.signals import run_program


def train() -> None:
    def load():
        from .cli.train import train

        return train

    run_program(load)


def evaluate() -> None:
    def load():
        from .cli.evaluate import evaluate

        return evaluate

    run_program(load)


def export() -> None:
    def load():
        from .cli.export import export

        return export

    run_program(load)


def report() -> None:
    def load():
        from .cli.report import report

        return report

    run_program(load)


if __name__ == "__main__":
    train()
