"""The folder `kernels/` at the root must not hide Hugging Face's library of that name, which transformers imports.

Run from the root, Python finds `kernels/` first. Without an `__init__.py` there it is only a namespace, and an
installed package of that name wins; with one, `import transformers` would die.
"""

import os
import subprocess
import sys
from pathlib import Path

from transformers.utils import import_utils

ROOT = Path(__file__).parent.parent
USES_KERNELS = """
import kernels, transformers.integrations.hub_kernels
from transformers.utils import is_kernels_available
print(kernels.__version__, is_kernels_available(), transformers.PreTrainedModel.__name__)
"""
VERSION = import_utils.KERNELS_MIN_VERSION  # outside the range it supports, transformers leaves the library alone


STAND_IN = f"""
__version__ = {VERSION!r}

class Anything:
    def __init__(self, *args, **kwargs): pass

LayerRepository = LocalLayerRepository = FuncRepository = Device = Mode = Anything

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *args, **kwargs: lambda function: function
"""


def stand_in(folder: Path) -> None:
    """A distribution `kernels` as an installer would leave it, with what transformers takes from it."""
    package, info = folder / "kernels", folder / f"kernels-{VERSION}.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text(STAND_IN)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {VERSION}\n")
    (info / "RECORD").write_text("")


def run_from_root(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in the root as `python -c` does: the root comes first on the path, installed packages after it."""
    env = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_installed_kernels_library_wins_over_the_folder(tmp_path):
    stand_in(tmp_path)
    result = run_from_root(USES_KERNELS, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [VERSION, "True", "PreTrainedModel"]


def test_the_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
