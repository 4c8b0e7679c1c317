"""Imported by Python itself when a process starts: has kt_expert_client imported as soon as transformers is."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

_HERE = str(Path(__file__).parent)


class _AfterTransformers(importlib.abc.MetaPathFinder):
    """Finds transformers as ever, and imports the client once that is there. Libraries look for it before they import it, so
    that a search alone changes nothing."""

    def __init__(self) -> None:
        self._is_asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if fullname != "transformers" or self._is_asking:
            return None
        self._is_asking = True  # the other finders
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._is_asking = False
        if spec is not None and spec.loader is not None:
            _import_client_after(spec.loader)
        return spec


def _import_client_after(loader: importlib.abc.Loader) -> None:
    original = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        original(module)
        import kt_expert_client  # noqa: F401  # connects what is loaded from now on

    loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one module's loader


def _run_the_one_behind() -> None:
    """A sitecustomize of the machine's, which this one hides."""
    places = [place for place in sys.path if str(Path(place or ".").resolve()) != str(Path(_HERE).resolve())]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", places)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, _AfterTransformers())
_run_the_one_behind()
