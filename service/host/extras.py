"""Advice for optional dependencies that are missing or can not be loaded."""

from __future__ import annotations


def not_installed(error: ImportError, extra: str) -> str:
    """Names the missing package and how to install it; no package index has this project.

    Args:
        error: Of the import that failed; an installed package that can not be loaded is named as
            such.
        extra: The extra of the server's distribution that brings it.
    """
    if not isinstance(error, ModuleNotFoundError):
        return f"an installed package can not be loaded, reinstall it: {error}"
    return (
        f"{error.name} is not installed: pip install -e ./proto -e '.[{extra}]' in a clone, or "
        f"pip install 'FOLDER/digits_serving-VERSION-py3-none-any.whl[{extra}]' from a wheel"
    )
