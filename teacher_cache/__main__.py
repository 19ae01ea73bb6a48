"""The console script teacher-cache, also as `python -m teacher_cache`."""

from .terminal.signals import run_program


def main() -> None:
    def load():
        from .cli.main import main

        return main

    run_program(load)


if __name__ == "__main__":
    main()
