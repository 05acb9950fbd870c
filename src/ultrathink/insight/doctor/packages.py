"""Which packages are installed, against what this package's own metadata asks for. Without torch.

The metadata lists requirements as pip reads them: https://packaging.python.org/specifications/.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NAME = "ultrathink"


@dataclass(frozen=True)
class Package:
    """A package that is asked for."""

    requirement: str  # with its versions, as pip takes it: torch~=2.13.0
    name: str
    installed: str | None  # its version; None where it is missing
    fits: bool  # whether that version is one that is asked for
    extra: str | None  # the extra that it belongs to; None for what is always needed

    @property
    def fix(self) -> str:
        """The command that installs it."""
        if self.extra is not None:
            return f'pip install "{NAME}[{self.extra}]"'
        return f'pip install "{self.requirement}"'


def read_packages(distribution: str = NAME) -> list[Package] | None:
    """All that ``distribution`` asks for, by extra; None where it is not installed by pip."""
    try:
        found = metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return None
    requirements = [Requirement(text) for text in found.requires or []]
    packages = [_package(r, None) for r in requirements if _applies(r, "")]
    for extra in found.metadata.get_all("Provides-Extra") or []:
        packages += [
            _package(r, extra)
            for r in requirements
            if _applies(r, extra) and not _applies(r, "") and r.name != distribution
        ]
    return packages


def installed_version(name: str) -> str | None:
    """The version of a package, None where it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _package(requirement: Requirement, extra: str | None) -> Package:
    version = installed_version(requirement.name)
    return Package(
        requirement=f"{requirement.name}{requirement.specifier}",
        name=canonicalize_name(requirement.name),
        installed=version,
        fits=version is not None and requirement.specifier.contains(version, prereleases=True),
        extra=extra,
    )
