# Read by `make lab`: a notebook is saved without what changes from person to person (nbdev's own hook, for this
# project only; `nbdev_install_hooks` would write it into the home folder, for every Jupyter of the user).
from nbdev.clean import clean_jupyter

c.ContentsManager.pre_save_hook = clean_jupyter  # noqa: F821 (Jupyter puts `c` there)
