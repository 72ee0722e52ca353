"""Imports what a server imports, but the modules that act on the settings of their process: see `fork_server`."""

from __future__ import annotations

import importlib
import pkgutil

import uvicorn.main  # noqa: F401 - as the others

import app.api
import app.services.container
import app.trace
import app.workers

for _module in pkgutil.walk_packages(app.api.__path__, "app.api."):
    importlib.import_module(_module.name)
