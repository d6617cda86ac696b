"""Maps the top-level trees kernels/, datasets/ and configs/ into the package; the rest is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

# kernels/ and datasets/ have no __init__.py of their own: with one, a checkout on the path would shadow
# Hugging Face's `datasets`. A wheel holds each of their folders inside vision_gates instead.
packages = find_namespace_packages(include=["vision_gates", "vision_gates.*"])
package_dir = {}
for tree in ("kernels", "datasets", "configs"):
    for name in find_namespace_packages(tree):
        packages.append(f"vision_gates.{tree}.{name}")
        package_dir[f"vision_gates.{tree}.{name}"] = f"{tree}/{name.replace('.', '/')}"

setup(packages=packages, package_dir=package_dir, package_data={"": ["*.yaml", "py.typed"]})
