"""The errors that a person can mend, each with the exit code that `launch/` ends with."""


class AetherError(Exception):
    """An error whose message is complete: one sentence that names the thing, and what to change."""

    exit_code = 1


class InputError(AetherError, ValueError):
    """Something that the user gave is wrong: a config value, a file, a workdir of another run."""

    exit_code = 2


class CheckError(AetherError):
    """A check on results failed, for example too many non-finite steps in a row."""

    exit_code = 3


class StorageError(AetherError):
    """A disk is full, or something on it cannot be read or written."""

    exit_code = 74


class Stopped(AetherError):
    """A signal stopped the run and everything is saved: the same command goes on from there."""

    exit_code = 75


def retold(kind: str, text: str) -> AetherError | None:
    """Return an error that another process raised, by the name of its class; None if it is none of ours."""
    kinds = [AetherError]
    for k in kinds:
        kinds += k.__subclasses__()
    return next((k(text) for k in kinds if k.__name__ == kind), None)
