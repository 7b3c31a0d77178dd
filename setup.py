"Package metadata comes from settings.ini, the single source."
from configparser import ConfigParser

from setuptools import setup

cfg = ConfigParser(delimiters=["="], interpolation=None)
cfg.read("settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]
setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], license="Apache-2.0", author=cfg["author"],
    python_requires=f">={cfg['min_python']},<3.13", packages=[cfg["lib_name"]],
    package_data={cfg["lib_name"]: ["roles.json"]}, install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()}, entry_points={"console_scripts": [cfg["console_scripts"]]},
)
