"""`graphopt.load`: a built folder as a callable, here or under an emulator."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from graphopt import errors
from graphopt.runtime.loader import Array, Model, read_manifest


class LoadedModel(Model):
    """`Model` that raises graphopt's own errors."""

    artifact_error: ClassVar[type[Exception]] = errors.ArtifactError
    input_error: ClassVar[type[Exception]] = errors.InputError


class EmulatedModel(LoadedModel):
    """A model built for another CPU; each call starts the emulator. Its times mean nothing."""

    def _open(self) -> None:
        from graphopt.runtime.devices import EmulatorDevice

        self._device = EmulatorDevice()
        self._closed = False

    def _execute(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        self._check_open()
        return self._device.run(self.folder, inputs, threads=self.threads)

    def time(self, repeats: int = 10, *args: Array, warmup: int = 1) -> list[float]:
        """Seconds of each run inside the emulator, its start and the copying left out."""
        self._check_open()
        inputs = self.bind(args, {}) if args else self.sample_inputs()
        return self._device.time(
            self.folder, inputs, repeats=repeats, warmup=warmup, threads=self.threads
        )

    def profile(self, *args: Array, repeats: int = 1) -> list[tuple[str, float]]:
        """Not possible under an emulator, whose times mean nothing.

        Raises:
            TargetError: always.
        """
        raise errors.TargetError(
            f"{self.name} runs under an emulator, which cannot tell how long its steps take",
            hint="profile it on the board.",
        )

    def close(self) -> None:
        """The model cannot be called any more."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise errors.ArtifactError(f"{self.name} is closed")


def load(folder: str | Path, threads: int | None = None) -> LoadedModel:
    """The model in a folder that graphopt built; needs numpy, and neither torch nor tvm.

    For another kind of CPU it runs under qemu.

    Args:
        folder: what `export` wrote.
        threads: threads to work with (None: the default of the build).

    Raises:
        ArtifactError: no complete build there, or this CPU lacks an instruction it needs.
    """
    manifest = read_manifest(folder, errors.ArtifactError)
    is_native = manifest["target"]["arch"] == platform.machine()
    return LoadedModel(folder, threads) if is_native else EmulatedModel(folder, threads)
