"""Map the top-level folders to ``sgclassify.*`` so that no sub-package is left out of the wheel."""

from setuptools import find_packages, setup

PARTS = ("pipeline", "stages", "model", "simulation")

packages = [name for part in PARTS for name in (part, *(f"{part}.{sub}" for sub in find_packages(part)))]
setup(
    packages=[f"sgclassify.{name}" for name in packages],
    package_dir={f"sgclassify.{name}": name.replace(".", "/") for name in packages},
)
