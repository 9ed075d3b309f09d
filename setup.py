"""Copy the kernels' sources and the DeepSpeed configurations into a wheel; all metadata lives in pyproject.toml.

Both folders stay at the top level of the repository, where `kernels` must not be importable. A wheel holds them as
`eve_ds/kernels` and `eve_ds/ds_configs`; an editable install uses the checkout. Nothing is compiled at installation.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SOURCES = ("kernels/*.cpp", "kernels/*.cu", "kernels/*.cuh", "kernels/*.h", "ds_configs/*.json")


class BuildWithSources(build_py):
    """Build step that adds the files of `SOURCES` to the package `eve_ds`."""

    def run(self) -> None:
        """Copy modules and package data, then the files of `SOURCES`; an editable install copies neither."""
        super().run()
        if self.editable_mode:
            return
        for source in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
            target = Path(self.build_lib) / "eve_ds" / source.relative_to(ROOT)
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))


setup(cmdclass={"build_py": BuildWithSources})
