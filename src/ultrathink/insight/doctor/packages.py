"""Installed packages against the requirements in this package's metadata. Without torch.

https://packaging.python.org/specifications/core-metadata/
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NAME = "ultrathink"


@dataclass(frozen=True)
class Package:
    """A required package."""

    requirement: str  # with its versions, as pip reads it: torch~=2.13.0
    name: str
    installed: str | None  # its version; None where it is missing
    fits: bool  # whether the installed version meets the requirement
    extra: str | None  # the extra that requires it; None for a core dependency

    @property
    def fix(self) -> str:
        """The command that installs it."""
        if self.extra is not None:
            return f'pip install "{NAME}[{self.extra}]"'
        return f'pip install "{self.requirement}"'


def read_packages(distribution: str = NAME) -> tuple[Package, ...] | None:
    """All requirements of ``distribution``; None where it was not installed by pip."""
    try:
        found = metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return None
    requirements = [Requirement(text) for text in found.requires or []]
    packages = [_package(r, None) for r in requirements if _applies(r, "")]
    of_extras = [r for r in requirements if not _applies(r, "") and r.name != distribution]
    for extra in found.metadata.get_all("Provides-Extra") or []:
        packages += [_package(r, extra) for r in of_extras if _applies(r, extra)]
    return tuple(packages)


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _package(requirement: Requirement, extra: str | None) -> Package:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        version = None
    return Package(
        requirement=f"{requirement.name}{requirement.specifier}",
        name=canonicalize_name(requirement.name),
        installed=version,
        fits=version is not None and requirement.specifier.contains(version, prereleases=True),
        extra=extra,
    )
