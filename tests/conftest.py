"What all tests share: hypothesis without deadlines (no test asserts on time), and the project as the place where runs live."
import os
from pathlib import Path

import hypothesis

hypothesis.settings.register_profile("project", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("project")
os.environ.setdefault("DEESCAL_ROOT", str(Path(__file__).resolve().parents[1]))
