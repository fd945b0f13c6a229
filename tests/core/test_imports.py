"""What an import costs: the losses bring torch and nothing heavier; every module imports."""

import pkgutil
import subprocess
import sys

import tokenpo

INSIDE_VERL = tuple(f"tokenpo.integrations.verl.{name}" for name in ("plugin", "config", "trainer"))
"""Imported by verl and importing it: tests_verl/ runs them where it is."""

HEAVY = ("transformers", "datasets", "peft", "accelerate", "evaluate", "bitsandbytes", "pandas", "pyarrow", "scipy")


def fresh(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_losses_import_torch_only():
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {HEAVY}:
            raise ImportError(name + ' is hidden')
sys.meta_path.insert(0, Refuse())
from tokenpo.losses import tdpo_loss
import tokenpo.credit, tokenpo.advantages, tokenpo.statistics, tokenpo.masked
from tokenpo.methods import all_methods
all_methods()
print([name for name in {HEAVY} if name in sys.modules])
"""
    assert fresh(code).strip() == "[]"


def test_the_package_itself_imports_nothing():
    assert fresh("import sys, tokenpo; print('torch' in sys.modules)").strip() == "False"


def test_help_needs_no_torch():
    code = "import sys; from tokenpo.cli import main; main(['--help']); print('torch' in sys.modules)"
    assert fresh(code).strip().endswith("False")


def test_every_module_imports():
    names = [m.name for m in pkgutil.walk_packages(tokenpo.__path__, "tokenpo.") if not m.name.endswith("__main__")]
    names = [name for name in names if name not in INSIDE_VERL]
    assert len(names) > 30
    fresh("import importlib\nfor name in " + repr(names) + ": importlib.import_module(name)")
