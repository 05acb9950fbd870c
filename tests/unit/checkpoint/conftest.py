from tests.unit.runs.conftest import disk as disk
from tests.unit.runs.conftest import run as run
