"""Set the version of one package, and close its CHANGELOG's "Unreleased" section under that version.

    python tools/bump.py ds-comm minor            # major | minor | patch | an explicit 1.2.3
    python tools/bump.py --check                  # every package: version, changelog and sibling ranges agree

Packages are versioned separately: the version stands in `src/<import>/__about__.py` and nowhere else, and siblings
depend on each other by range. A bump that leaves a sibling's range behind says which file asks for what, and changes
nothing until the range is widened (`--force` writes all the same).
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

VERSION_LINE = re.compile(r'^__version__ = "([^"]+)"$', re.MULTILINE)
UNRELEASED = re.compile(r"^## \[?Unreleased\]?[ \t]*$", re.MULTILINE | re.IGNORECASE)
RELEASED = re.compile(r"^## \[?(\d[^\]\s]*)\]?", re.MULTILINE)
REQUIREMENT = re.compile(r'"((?:ds-[a-z]+|deepspeed)(?:\[[a-z,]+\])?[^"a-z]*)"')


@dataclass(frozen=True)
class Package:
    """The three files of a package that know about versions."""

    name: str
    folder: Path

    @property
    def about(self) -> Path:
        return self.folder / "src" / self.name.replace("-", "_") / "__about__.py"

    @property
    def changelog(self) -> Path:
        return self.folder / "CHANGELOG.md"

    def version(self) -> Version:
        found = VERSION_LINE.search(self.about.read_text(encoding="utf-8"))
        if found is None:
            raise ValueError(f'{self.about}: no line `__version__ = "..."`')
        return Version(found[1])

    def requirements(self) -> list[Requirement]:
        """What this package asks of its siblings."""
        text = (self.folder / "pyproject.toml").read_text(encoding="utf-8")
        return [Requirement(found) for found in REQUIREMENT.findall(text) if found != self.name]


def packages(root: Path) -> dict[str, Package]:
    return {
        path.parent.name: Package(path.parent.name, path.parent)
        for path in sorted(root.glob("packages/*/pyproject.toml"))
    }


def next_version(current: Version, level: str) -> Version:
    """`level` is major, minor, patch, or a version above the current one."""
    major, minor, patch = current.release + (0,) * (3 - len(current.release))
    steps = {"major": (major + 1, 0, 0), "minor": (major, minor + 1, 0), "patch": (major, minor, patch + 1)}
    if level in steps:
        return Version(".".join(map(str, steps[level])))
    try:
        wanted = Version(level)
    except InvalidVersion:
        raise ValueError(f"{level!r} is not major, minor, patch or a version such as 1.2.3") from None
    if wanted <= current:
        raise ValueError(f"{wanted} is not above the current version {current}")
    return wanted


def left_behind(all_packages: dict[str, Package], name: str, version: Version) -> Iterator[str]:
    """Siblings whose range for `name` does not admit `version`."""
    for package in all_packages.values():
        for requirement in package.requirements():
            if requirement.name == name and not requirement.specifier.contains(version, prereleases=True):
                yield f"{package.name} asks for {requirement}, which {name} {version} is not"


def bump(package: Package, version: Version, today: datetime.date) -> None:
    """Write the version, and turn the changelog's Unreleased section into the version's own below a new empty one."""
    log = package.changelog.read_text(encoding="utf-8")
    heading = UNRELEASED.search(log)
    if heading is None:
        raise ValueError(f"{package.changelog}: no heading `## Unreleased`: nothing to release")
    if not log[heading.end() :].partition("\n## ")[0].strip():
        raise ValueError(f"{package.changelog}: the section Unreleased is empty: say what changed first")
    released = f"## Unreleased\n\n## {version} - {today.isoformat()}"
    package.changelog.write_text(log[: heading.start()] + released + log[heading.end() :], encoding="utf-8")
    about = package.about.read_text(encoding="utf-8")
    package.about.write_text(VERSION_LINE.sub(f'__version__ = "{version}"', about), encoding="utf-8")


def check(all_packages: dict[str, Package]) -> Iterator[str]:
    """What disagrees: headings out of order, a version nobody wrote up, a range that shuts a sibling out."""
    for package in all_packages.values():
        version = package.version()
        log = package.changelog.read_text(encoding="utf-8") if package.changelog.exists() else ""
        released = [Version(found) for found in RELEASED.findall(log)]
        if released != sorted(released, reverse=True):
            yield f"{package.name}: the changelog's versions are not newest first"
        if released[:1] != [version] and not (UNRELEASED.search(log) and all(one < version for one in released)):
            yield f"{package.name}: version {version} has no section in the changelog, nor is there an Unreleased one"
        yield from left_behind(all_packages, package.name, version)


def main(argv: list[str], root: Path | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", nargs="?", help="the distribution's name, such as ds-comm")
    parser.add_argument("level", nargs="?", help="major, minor, patch, or the version itself")
    parser.add_argument("--check", action="store_true", help="only check that versions, changelogs and ranges agree")
    parser.add_argument(
        "--force", action="store_true", help="bump although a sibling's range does not admit the version"
    )
    args = parser.parse_args(argv)
    all_packages = packages(root or Path(__file__).resolve().parents[1])
    if args.check:
        findings = list(check(all_packages))
        print("\n".join([*findings, f"versions: {len(all_packages)} packages, {len(findings)} findings"]))
        return 1 if findings else 0
    if args.package not in all_packages or args.level is None:
        parser.error(f"expected a package ({', '.join(all_packages)}) and a level, got {args.package!r} {args.level!r}")
    package = all_packages[args.package]
    try:
        version = next_version(package.version(), args.level)
        behind = list(left_behind(all_packages, package.name, version))
        if behind and not args.force:
            raise ValueError("\n".join([*behind, "widen these ranges first, or pass --force"]))
        bump(package, version, datetime.date.today())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{package.name} {version}: commit it and tag {package.name}-v{version}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
