"""Packaging: everything is read from settings.ini, the same file nbdev reads."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
readme = here / "README.md"

extras = {key.removesuffix("_requirements"): cfg[key].split() for key in cfg if key.endswith("_requirements")}
extras["all"] = sorted({*extras["lab"], *extras["view"], *extras["parquet"], *extras["saturn"], *extras["perturb"], *extras["cycle"], *extras["workflow"]})
extras["dev"] += [*extras["all"], *extras["squidpy"], *extras["docs"]]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    author=cfg["author"],
    license="Apache-2.0",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    packages=find_packages(include=["gears_nb", "gears_nb.*"]),
    package_data={"gears_nb.attention": ["*.js", "*.css"], "gears_nb.benchmark": ["peers.ini"], "gears_nb.models": ["models.ini"], "gears_nb.saturn": ["*.gmt"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    zip_safe=False,
)
